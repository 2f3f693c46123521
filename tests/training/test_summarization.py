"""Summaries of a table's documents: the whole recipe, its two limits of length, and ROUGE as others compute it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sparseq.cli import main
from sparseq.training.recipes import Recipe, load_recipe
from sparseq.training.run import TrainResult, train

WORDS = ["one", "two", "three", "four", "five", "six"]
SIZES = {"train": 60, "val": 8, "test": 9}
FIGURES = ["rouge1", "rouge2", "rougeL"]
MAX_LENGTH = 24

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tables. Every fourth document is longer than the limit, and every summary begins with its words."""
    folder = tmp_path_factory.mktemp("documents")
    for split, size in SIZES.items():
        rows = []
        for i in range(size):
            words = [WORDS[(i * k + i // 5) % 6] for k in range(1, 42 if i % 4 == 3 else 9 + i % 5)]
            rows.append({"document": " ".join(words), "summary": " ".join(["walking", *words[:3]])})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(table: Path) -> Callable[..., Recipe]:
    """The recipe that comes with Sparseq, made small."""

    def make(*overrides: str) -> Recipe:
        splits = ("train", "train"), ("validation", "val"), ("test", "test")
        places = [f"data.{key}_files={table / name}.jsonl" for key, name in splits]
        sizes = ["d_model", "encoder_ffn_dim", "decoder_ffn_dim", "expert_ffn_dim"]
        layers = ["encoder_layers=1", "decoder_layers=1", "encoder_sparse_step=1", "decoder_sparse_step=1"]
        model = [*(f"model.{name}=16" for name in sizes), *(f"model.{layer}" for layer in layers)]
        training = ["tokens_per_batch=256", "gradient_accumulation_steps=1", "learning_rate=0.02", "warmup_steps=4"]
        training += ["max_steps=24", "save_steps=12", "eval_steps=12", "average_checkpoints=1", "bf16=false"]
        lengths = [f"data.max_length={MAX_LENGTH}", "data.max_target_length=8", "decoding.max_length=14"]
        changes = [*places, *model, *(f"training.{item}" for item in training), *lengths, "tokenizer.vocab_size=320"]
        return load_recipe("summarization", [*changes, *overrides])

    return make


@pytest.fixture(scope="module")
def finished(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(recipe(), tmp_path_factory.mktemp("run") / "out", progress=False, bootstrap=20)


def test_the_scores_are_those_of_rouge_score(finished: TrainResult) -> None:
    scorer = RougeScorer(FIGURES, use_stemmer=True)
    outputs = (finished.output_dir / "test.target.translated").read_text(encoding="utf-8").splitlines()
    assert outputs == finished.translations
    rows = [scorer.score(*pair) for pair in zip(finished.references, outputs, strict=True)]
    written = json.loads((finished.output_dir / "results.json").read_text(encoding="utf-8"))["scores"]
    for figure in FIGURES:
        expected = 100 * sum(row[figure].fmeasure for row in rows) / len(rows)
        assert written[figure] == pytest.approx(expected)
        assert f"{figure}_ci" in written
    assert written["rouge1"] > 0
    assert written["sentences"] == SIZES["test"]
    assert "tok:ascii|stem:porter" in written["rouge_signature"]
    assert not {"bleu", "chrf"} & written.keys()


def test_the_command_scores_the_table_as_the_run_did(finished: TrainResult, table: Path, tmp_path: Path) -> None:
    columns = ["--source-column", "document", "--target-column", "summary"]
    options = ["--metrics", "rouge", "--rouge-stemmer", "--bootstrap", "20", "--output", str(tmp_path / "score.json")]
    outputs = tmp_path / "out.txt"
    data = ["--data", str(table / "test.jsonl"), *columns]
    assert main(["score", str(finished.output_dir), *data, *options, "--translations", str(outputs)]) == 0
    assert outputs.read_text(encoding="utf-8").splitlines() == finished.translations
    report = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    assert {key: report[key] for key in finished.scores} == finished.scores
    # Documents in full make other summaries than those that are cut as in training.
    whole = ["--max-source-length", "100", "--translations", str(outputs)]
    assert main(["score", str(finished.output_dir), *data, *options, *whole]) == 0
    assert outputs.read_text(encoding="utf-8").splitlines() != finished.translations


def test_a_fine_tuned_model_cuts_documents_where_its_run_did(
    finished: TrainResult, table: Path, tmp_path: Path
) -> None:
    files = [f"data.train_files={table / 'train.jsonl'}", f"data.validation_files={table / 'val.jsonl'}"]
    columns = ["data.source_column=document", "data.target_column=summary", f"start.checkpoint={finished.output_dir}"]
    training = ["training.max_steps=1", "training.save_steps=1", "training.eval_steps=0", "training.warmup_steps=0"]
    training += ["training.average_checkpoints=1", "scoring.metrics=[rouge]", "data.max_length=30"]
    recipe = load_recipe("finetune", [*files, *columns, *training, "decoding.num_beams=1", "decoding.max_length=14"])
    result = train(recipe, tmp_path / "out", progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 30
    data = ["--data", str(table / "val.jsonl"), "--source-column", "document", "--target-column", "summary"]
    outputs = ["--metrics", "rouge", "--translations", str(tmp_path / "out.txt")]
    assert main(["score", str(tmp_path / "out"), *data, *outputs]) == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == result.translations


def test_no_three_tokens_come_twice(finished: TrainResult) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(finished.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.output_dir)
    assert model.generation_config.no_repeat_ngram_size == 3
    batch = tokenizer(finished.sources, truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == MAX_LENGTH
    # Nothing ends the summaries here, so they have room to repeat themselves.
    outputs = model.generate(**batch, num_beams=1, max_length=14, suppress_tokens=[2]).tolist()
    free = model.generate(**batch, num_beams=1, max_length=14, suppress_tokens=[2], no_repeat_ngram_size=0).tolist()

    def repeats(ids: list[int]) -> bool:
        grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        return len(set(grams)) < len(grams)

    assert any(map(repeats, free))
    assert not any(map(repeats, outputs))


def test_each_side_has_its_own_limit(finished: TrainResult) -> None:
    noted = json.loads((finished.output_dir / "manifest.json").read_text(encoding="utf-8"))["data"]["train"]
    assert noted["kept"] == SIZES["train"]
    assert (noted["defects"]["too_long"]["count"], noted["defects"]["too_long"]["action"]) == (15, "truncate")


def log(folder: Path, key: str) -> list[tuple[int, float]]:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [(entry["step"], entry[key]) for entry in results["log"] if key in entry]


def test_rouge_chooses_the_weights_and_ends_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    judged = ["training.metric=rougeL", "training.early_stopping_patience=2", "training.final_weights=best"]
    # Steps too small to change a weight, so nothing gets better after the first evaluation.
    still = ["training.learning_rate=1e-30", "training.save_steps=2", "training.eval_steps=2"]
    result = train(recipe(*judged, *still), tmp_path, progress=False)
    assert result.steps == 6
    scores = log(tmp_path, "eval_rougeL")
    # The saved weights are evaluated once more at the end.
    assert [step for step, _ in scores] == [2, 4, 6, 6]
    assert {"eval_rouge1", "eval_rouge2"} <= {
        key for entry in json.loads((tmp_path / "results.json").read_text())["log"] for key in entry
    }
    state: dict[str, Any] = json.loads((tmp_path / "checkpoints/checkpoint-6/trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    assert state["best_metric"] == scores[0][1]


def test_a_dry_run_says_what_is_cut_and_how_it_is_scored(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"data.train_files={table / 'train.jsonl'}", f"data.validation_files={table / 'val.jsonl'}"]
    lengths = ["data.max_length=10", "data.max_target_length=3", "training.max_steps=6", "training.warmup_steps=1"]
    budget = ["training.tokens_per_batch=500", "training.gradient_accumulation_steps=1"]
    assert main(["train", "summarization", *files, *lengths, *budget, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "500 source+target tokens x 1 = 500 an update and device" in shown
    assert "lengths     at most 10 source and 3 target tokens" in shown
    assert "rouge: rouge1, rouge2, rougeL, nrefs:1|case:lc|tok:ascii|stem:porter" in shown
    documents = [json.loads(line)["document"].split() for line in (table / "train.jsonl").read_text().splitlines()]
    # 500 tokens an update; a long document counts 10, and each summary 3.
    counted = sum(min(len(words), 10) + 3 for words in documents)
    assert f"epochs      at most {6 * 500 / counted:,.1f}" in shown
