"""`sparseq export --to ctranslate2`: what CTranslate2 computes and writes is what the model does."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import ctranslate2
import pytest
import torch

from sparseq import SparseqForConditionalGeneration
from sparseq.cli import main
from sparseq.conversion.export_command import TARGETS
from sparseq.conversion.families import TARGETS as MODEL_TYPES
from sparseq.conversion.merged_experts import MergedExperts
from tests.conversion.changing import changed
from tests.conversion.exported import (
    NEW_TOKENS,
    TEXTS,
    check_converted,
    export,
    generated,
    run_readme,
    run_readme_here,
    sources,
    tokenizer,
    write_model,
)
from tests.conversion.tokenizer_folders import SENTENCES
from tests.tolerances import assert_close

DENSE: dict[str, dict[str, Any]] = {
    "rotary, grouped queries, gated": {},
    "rotary of another scale, one key-value head": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        "encoder_num_key_value_heads": 1,
    },
    "sinusoids of the paper, heads that differ": {
        "position_embedding_type": "sinusoidal",
        "encoder_attention_heads": 8,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "activation_function": "quick_gelu",
    },
    "as M2M100": {
        "position_embedding_type": "sinusoidal",
        "sinusoidal_layout": "halves",
        "sinusoidal_spacing": "tensor2tensor",
        "position_offset": 2,
        "norm_type": "layernorm",
        "gated_ffn": False,
        "activation_function": "relu",
        "attention_bias": True,
        "ffn_bias": True,
    },
    "as BART": {
        "position_embedding_type": "learned",
        "position_offset": 2,
        "norm_position": "post",
        "norm_type": "layernorm",
        "norm_eps": 1e-3,
        "embedding_norm": True,
        "gated_ffn": False,
        "activation_function": "gelu",
        "attention_bias": True,
        "ffn_bias": True,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "encoder_num_key_value_heads": None,
        "decoder_num_key_value_heads": None,
    },
    "norms behind sub-layers and at the end": {
        "norm_position": "post",
        "final_norm": True,
        "position_embedding_type": "sinusoidal",
        "activation_function": "gelu_new",
        "ffn_bias": True,
    },
    "no positions, no norm at the end, no bias": {
        "position_embedding_type": "none",
        "max_position_embeddings": None,
        "final_norm": False,
        "final_logits_bias": False,
        "tie_word_embeddings": True,
        "activation_function": "tanh",
    },
    "embeddings of their own": {
        "share_encoder_decoder_embeddings": False,
        "position_embedding_type": "learned",
        "activation_function": "sigmoid",
    },
}


def tokens_of(rows: list[list[int]]) -> list[list[str]]:
    return [tokenizer().convert_ids_to_tokens(row) for row in rows]


@torch.no_grad()
def log_probs(model: SparseqForConditionalGeneration, source: list[int], target: list[int]) -> torch.Tensor:
    """Log-probabilities `(T + 1,)` of a target's tokens and of its end."""
    start = [model.config.decoder_start_token_id]
    logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([start + target])).logits
    labels = torch.tensor([*target, model.config.eos_token_id])
    return logits[0].log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("name", DENSE)
def test_it_computes_and_writes_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_experts=0, **DENSE[name])
    export(tmp_path / "model", tmp_path / "exported", "--to", "ctranslate2")
    translator = ctranslate2.Translator(str(tmp_path / "exported"), intra_threads=1)
    source_ids = tokenizer()(TEXTS)["input_ids"]

    targets = tokenizer()(SENTENCES[4:7], add_special_tokens=False)["input_ids"]
    scored = translator.score_batch(tokens_of(source_ids), tokens_of(targets))
    for source, target, result in zip(source_ids, targets, scored, strict=True):
        assert_close(torch.tensor(result.log_probs), log_probs(model, source, target), torch.float32, name)

    options = {"max_decoding_length": NEW_TOKENS, "min_decoding_length": 0}
    for beams in (1, 4):
        results = translator.translate_batch(tokens_of(source_ids), beam_size=beams, **options)
        expected = generated(model, num_beams=beams, early_stopping=True if beams > 1 else None)
        assert [result.hypotheses[0] for result in results] == tokens_of(expected)


def test_translations_of_these_tests_end_early_and_late(tmp_path: Path) -> None:
    """Without this the search would be compared on sentences of one length only."""
    models = [write_model(tmp_path / name, num_experts=0, **DENSE[name]) for name in list(DENSE)[:4]]
    lengths = {len(row) for model in models for row in generated(model, num_beams=4, early_stopping=True)}
    assert len(lengths) > 2
    assert min(lengths) < NEW_TOKENS


def test_the_readme_says_how_to_run_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_experts=0, position_embedding_type="sinusoidal")
    model.generation_config.update(num_beams=3, early_stopping=True, length_penalty=0.5, no_repeat_ngram_size=2)
    model.generation_config.update(
        renormalize_logits=True, min_new_tokens=3, bad_words_ids=[[7], [8, 9]], suppress_tokens=[10]
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    exported = tmp_path / "exported"
    export(tmp_path / "model", exported, "--to", "ctranslate2", "--positions", "50")
    said = run_readme(exported, tmp_path, call=f"translate({TEXTS!r})")
    assert said == tokenizer().batch_decode(generated(model), skip_special_tokens=True)
    assert (exported / "README.md").read_text("utf-8").startswith("---\nlicense: mit\n---\n")
    record = json.loads((exported / "conversion.json").read_text("utf-8"))
    assert record["command"] == f"sparseq export {tmp_path / 'model'} --to ctranslate2 --positions 50"


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_k": 0},
        {"top_k": 3, "temperature": 0.5},
        {"top_k": 0, "top_p": 0.5, "temperature": 2.0},
        {"top_k": 1000, "top_p": 0.7},
        {"top_p": 0.0},
    ],
    ids=str,
)
def test_the_readme_samples_from_what_generate_samples_from(
    sampling: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", num_experts=0)
    model.generation_config.update(do_sample=True, **sampling)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", "--to", "ctranslate2")
    ctranslate2.set_random_seed(0)
    translate = Mock(wraps=ctranslate2.Translator(str(tmp_path / "exported"), intra_threads=1).translate_batch)
    monkeypatch.setattr(ctranslate2, "Translator", lambda folder: Mock(translate_batch=translate))
    run_readme_here(tmp_path / "exported", call=f"translate({TEXTS!r})")
    (source, *_), options = translate.call_args.args[0], translate.call_args.kwargs

    number = 20_000
    [result] = translate([source], **{**options, "num_hypotheses": number, "max_decoding_length": 1})
    drawn = tokenizer().convert_tokens_to_ids([one[0] if one else "</s>" for one in result.hypotheses])
    shares = torch.bincount(torch.tensor(drawn), minlength=len(tokenizer())) / number

    steps = model.generate(sources()[:1], max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    expected = steps.scores[0][0].softmax(dim=-1)
    assert not shares[expected == 0].any()
    # The distance of so many draws from what they are drawn from is 0.04 with 300 tokens, and less with fewer.
    assert (shares - expected).abs().sum() / 2 < 0.06


def test_beams_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CTranslate2 would draw otherwise than generate() does, or crash where `top_k` is small."""
    model = write_model(tmp_path / "model", num_experts=0)
    model.generation_config.update(do_sample=True, num_beams=3, early_stopping=True, temperature=2.0)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", "--to", "ctranslate2")
    note = "`do_sample` with `num_beams` (3) draws"
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "exported" / "README.md").read_text("utf-8")
    said = run_readme_here(tmp_path / "exported", call=f"translate({TEXTS!r})")
    assert said == tokenizer().batch_decode(generated(model, do_sample=False), skip_special_tokens=True)


def test_several_samples_are_sorted_and_the_readme_says_so(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_experts=0)
    model.generation_config.update(do_sample=True, num_return_sequences=5)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", "--to", "ctranslate2")
    readme = (tmp_path / "exported" / "README.md").read_text("utf-8")
    assert "num_hypotheses=5," in readme
    assert "CTranslate2 sorts the 5 samples of a text" in readme
    translator = ctranslate2.Translator(str(tmp_path / "exported"), intra_threads=1)
    options = {"beam_size": 1, "sampling_topk": 50, "num_hypotheses": 5, "return_scores": True}
    for result in translator.translate_batch(tokens_of(tokenizer()(TEXTS)["input_ids"]), **options):
        assert result.scores == sorted(result.scores, reverse=True)


@pytest.mark.parametrize(
    ("name", "language"),
    [
        *(("m2m100", "de"), ("nllb", "deu_Latn"), ("mbart", "de_DE"), ("mbart50", "de_DE")),
        *(("bart", None), ("marian", None), ("pegasus", None)),
    ],
)
def test_a_converted_model_with_its_tokenizer(name: str, language: str | None, tmp_path: Path) -> None:
    check_converted(name, language, "ctranslate2", tmp_path)


@pytest.mark.parametrize("quantization", ["int8", "float16"])
def test_weights_of_fewer_bits(quantization: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", num_experts=0, d_model=64, encoder_ffn_dim=256, decoder_ffn_dim=256)
    sizes = {}
    for name, options in (("whole", []), ("short", ["--quantization", quantization])):
        export(tmp_path / "model", tmp_path / name, "--to", "ctranslate2", *options)
        sizes[name] = (tmp_path / name / "model.bin").stat().st_size
        translator = ctranslate2.Translator(str(tmp_path / name), intra_threads=1)
        source_ids, targets = tokenizer()(TEXTS)["input_ids"], tokenizer()(SENTENCES[4:7])["input_ids"]
        scores = translator.score_batch(tokens_of(source_ids), tokens_of(targets))
        sizes[f"{name} mean"] = sum(sum(one.log_probs) / len(one.log_probs) for one in scores) / len(scores)
    assert sizes["short"] < (0.36 if quantization == "int8" else 0.56) * sizes["whole"]
    # Rounded, and the same model all the same: of 300 tokens, chance has log-probability -5.7.
    assert abs(sizes["short mean"] - sizes["whole mean"]) < 0.05 * abs(sizes["whole mean"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_experts=0).to(dtype)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported", "--to", "ctranslate2")
    translator = ctranslate2.Translator(str(tmp_path / "exported"), intra_threads=1)
    source, target = tokenizer()(TEXTS[0])["input_ids"], [5, 6, 7]
    [result] = translator.score_batch(tokens_of([source]), tokens_of([target]))
    # On a CPU both are computed in float32, bfloat16 with the weights that it has.
    assert_close(torch.tensor(result.log_probs), log_probs(model.float(), source, target), torch.float32)


@pytest.mark.parametrize("experts", ["mean", "0,2"])
def test_a_sparse_model_is_merged_as_densify_does(experts: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_experts=4)
    options = ["--to", "ctranslate2", "--merge-experts", experts]
    export(tmp_path / "model", tmp_path / "exported", *options)
    (tmp_path / "work").mkdir()
    kept = None if experts == "mean" else (0, 2)
    dense = changed(model, tmp_path / "work", MergedExperts(experts=kept))
    translator = ctranslate2.Translator(str(tmp_path / "exported"), intra_threads=1)
    results = translator.translate_batch(
        tokens_of(tokenizer()(TEXTS)["input_ids"]), beam_size=1, max_decoding_length=NEW_TOKENS, min_decoding_length=0
    )
    expected = generated(dense, max_new_tokens=NEW_TOKENS, max_length=None)
    assert [result.hypotheses[0] for result in results] == tokens_of(expected)


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "experts": ({"num_experts": 4}, [], "--merge-experts mean"),
    "no experts to merge": ({"num_experts": 0}, ["--merge-experts", "mean"], "it is a dense model already"),
    "activation": ({"num_experts": 0, "activation_function": "mish"}, [], "no activation 'mish'"),
    "learned": (
        {"num_experts": 0, "position_embedding_type": "learned"},
        ["--positions", "99"],
        "--positions 99 is for positions that are put into a table, but the model has 64 learned ones",
    ),
    "rotary": ({"num_experts": 0}, ["--positions", "99"], "but the model has any number of them"),
    "option of others": ({"num_experts": 0}, ["--dtype", "float16"], "--dtype is for bart, "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, options, answer = REFUSED[name]
    write_model(tmp_path / "model", **fields)
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "ctranslate2", *options]
    assert main(arguments) == 2
    assert answer in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model", num_experts=0)
    for path in tmp_path.glob("model/tokenizer*"):
        path.unlink()
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "ctranslate2"]) == 2
    assert "has no tokenizer, but CTranslate2 is given tokens" in capsys.readouterr().err


def test_numbers_beyond_float16_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", num_experts=0)
    model.model.encoder.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "ctranslate2", "--quantization"]
    assert main([*arguments, "float16"]) == 2
    assert "too large for float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", num_experts=0, position_embedding_type="sinusoidal")
    model.generation_config.update(num_beams=2, early_stopping="never", forced_eos_token_id=2, repetition_penalty=1.2)
    model.generation_config.update(no_repeat_ngram_size=3)
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "--to", "ctranslate2", "--dry-run", "--quantization", "int8")
    said = capsys.readouterr().out
    for part in (
        "stored as int8",
        "64 positions",
        "`early_stopping` is 'never'",
        "`repetition_penalty`",
        "`forced_eos_token_id` (2)",
    ):
        assert part in said
    assert not (tmp_path / "out").exists()


def test_embeddings_without_a_token_have_a_place(tmp_path: Path) -> None:
    write_model(tmp_path / "model", num_experts=0, vocab_size=len(tokenizer()) + 2)
    export(tmp_path / "model", tmp_path / "exported", "--to", "ctranslate2")
    tokens = json.loads((tmp_path / "exported" / "shared_vocabulary.json").read_text("utf-8"))
    known = sorted(tokenizer().get_vocab().items(), key=lambda item: item[1])
    assert tokens[:-2] == [token for token, _ in known]
    assert len(set(tokens)) == len(tokenizer()) + 2


def test_the_table_of_targets_has_all_there_are() -> None:
    assert set(MODEL_TYPES) < set(TARGETS)
    from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES

    from sparseq.conversion.export_command import _QUANTIZATIONS

    assert set(_QUANTIZATIONS) == set(ACCEPTED_MODEL_TYPES)
