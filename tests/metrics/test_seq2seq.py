"""`Seq2SeqMetrics` and the documented function inside a stock Seq2SeqTrainer."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from sparseq.metrics import Seq2SeqMetrics, translation_scores
from sparseq.metrics.corpus import Bleu, ExactMatch, Rouge

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pairs(corpus: Path) -> list[tuple[str, str]]:
    sides = [(corpus / f"test.{language}").read_text().splitlines() for language in ("xx", "yy")]
    return list(zip(*sides, strict=True))


def evaluate_with(
    compute_metrics: Any,
    models_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    folder: Path,
    **arguments: Any,
) -> dict[str, float]:
    """The metrics of a stock trainer, in batches of different lengths."""
    model = AutoModelForSeq2SeqLM.from_pretrained(models_folder / "first")
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder),
            per_device_eval_batch_size=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **{"predict_with_generate": True, "generation_max_length": 10, **arguments},
        ),
        eval_dataset=[dict(tokenizer(source, text_target=target)) for source, target in pairs],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    return trainer.evaluate()


def translations(models_folder: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[str]:
    """One sentence at a time."""
    model = AutoModelForSeq2SeqLM.from_pretrained(models_folder / "first")
    outputs = [
        model.generate(**tokenizer(source, return_tensors="pt"), max_length=10, num_beams=1)[0] for source, _ in pairs
    ]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]


def test_inside_a_stock_trainer(
    models_folder: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    compute = Seq2SeqMetrics(tokenizer, ["chrf", ExactMatch(), Bleu(tokenize="none"), "rouge"])
    assert compute.signatures == {}
    metrics = evaluate_with(compute, models_folder, tokenizer, pairs, tmp_path)
    found = translations(models_folder, tokenizer, pairs)
    expected = translation_scores(found, [target for _, target in pairs], tokenize="none")
    assert metrics["eval_chrf"] == pytest.approx(expected["chrf"])
    assert metrics["eval_bleu"] == pytest.approx(expected["bleu"])
    assert 0 < metrics["eval_bleu"] < 100
    assert metrics["eval_exact_match"] == pytest.approx(100 * 8 / 12)
    assert metrics["eval_generated_tokens"] == pytest.approx(np.mean([len(text.split()) for text in found]))
    assert {"eval_rouge1", "eval_rougeL"} <= metrics.keys()
    assert compute.signatures["bleu"] == expected["bleu_signature"]
    assert set(compute.signatures) == {"chrf", "exact_match", "bleu", "rouge"}


def test_the_documented_function_inside_a_stock_trainer(
    models_folder: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scoring.md").read_text("utf-8"), flags=re.DOTALL)
    (code,) = [block for block in blocks if "def compute_metrics(" in block]
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(code, names)
    metrics = evaluate_with(names["compute_metrics"], models_folder, tokenizer, pairs, tmp_path)
    expected = translation_scores(translations(models_folder, tokenizer, pairs), [target for _, target in pairs])
    assert metrics["eval_bleu"] == pytest.approx(expected["bleu"])
    assert metrics["eval_chrf"] == pytest.approx(expected["chrf"])


def test_logits_are_refused(
    models_folder: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    compute = Seq2SeqMetrics(tokenizer)
    with pytest.raises(ValueError, match="set `predict_with_generate=True`"):
        evaluate_with(compute, models_folder, tokenizer, pairs, tmp_path, predict_with_generate=False)


def test_padding_of_both_kinds_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    generated = np.array([[1, 7, 8, 2, 0, -100], [1, 7, 8, 9, 10, 2]])
    labels = np.array([[7, 8, 2, -100, -100], [7, 8, 9, 11, 2]])
    metrics = Seq2SeqMetrics(tokenizer, ["exact_match"])(EvalPrediction(predictions=generated, label_ids=labels))
    assert metrics == {"exact_match": 50.0, "generated_tokens": 3.0}


def test_postprocessing_serves_rouge_lsum(tokenizer: PreTrainedTokenizerFast) -> None:
    # Two sentences, exchanged.
    batch = EvalPrediction(predictions=np.array([[7, 8, 9, 3, 4, 5]]), label_ids=np.array([[3, 4, 5, 7, 8, 9]]))
    words = tokenizer.convert_ids_to_tokens([4, 5])
    lines = Seq2SeqMetrics(
        tokenizer, [Rouge()], postprocess=lambda text: text.replace(words[0], f"\n{words[0]}").replace("w3", "\nw3")
    )
    plain, split = Seq2SeqMetrics(tokenizer, [Rouge()])(batch), lines(batch)
    assert split["rougeLsum"] == pytest.approx(100)
    assert plain["rougeLsum"] < 70


def test_mistakes_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="Did you mean 'bleu'"):
        Seq2SeqMetrics(tokenizer, ["blue"])
    with pytest.raises(ValueError, match="must be a list of at least one metric, but is 'bleu'"):
        Seq2SeqMetrics(tokenizer, "bleu")
    with pytest.raises(ValueError, match="at least one metric"):
        Seq2SeqMetrics(tokenizer, [])
