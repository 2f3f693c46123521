"""Saving and loading: every class from every folder, in low memory, in other types, on mapped devices."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, PreTrainedModel

from sparseq import SparseqEncoderModel, SparseqForConditionalGeneration, SparseqModel
from tests.tiny import label_batch, source_batch, tiny_model
from tests.tolerances import assert_close

CASES: list[dict[str, Any]] = [
    {},
    {"num_experts": 0, "position_embedding_type": "sinusoidal"},
    {"tie_word_embeddings": False},
    {"share_encoder_decoder_embeddings": False},
    {
        "tie_word_embeddings": False,
        "share_encoder_decoder_embeddings": False,
        "final_logits_bias": True,
        "position_embedding_type": "learned",
        "router_balancing": "loss_free",
        "expert_bias": True,
    },
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case) or "default")
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SparseqForConditionalGeneration, Path]:
    model = tiny_model(**request.param)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("final_logits_bias", "e_score_correction_bias")):
                buffer.normal_()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def load(auto_class: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["mismatched_keys"]
    return model.eval(), info


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=source_batch(), labels=label_batch()).logits


def check_ties(model: Any) -> None:
    base, config = model.base_model, model.config
    assert base.encoder.embed_tokens.weight is base.shared.weight
    if hasattr(base, "decoder"):
        is_shared = base.decoder.embed_tokens.weight is base.shared.weight
        assert is_shared == config.share_encoder_decoder_embeddings
    if hasattr(model, "lm_head"):
        assert (model.lm_head.weight is base.decoder.embed_tokens.weight) == config.tie_word_embeddings


def test_the_whole_model_comes_back(saved: tuple[SparseqForConditionalGeneration, Path]) -> None:
    model, folder = saved
    loaded, info = load(AutoModelForSeq2SeqLM, folder)
    assert type(loaded) is SparseqForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    check_ties(model)
    check_ties(loaded)
    assert_close(logits(loaded), logits(model), torch.float32)
    ids = source_batch()
    assert torch.equal(loaded.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8))


def test_the_encoder_alone_comes_out_of_the_whole_with_no_key_missing(
    saved: tuple[SparseqForConditionalGeneration, Path], tmp_path: Path
) -> None:
    model, folder = saved
    loaded, info = load(AutoModelForTextEncoding, folder)
    assert type(loaded) is SparseqEncoderModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"], "the decoder is left out on purpose, not by surprise"
    check_ties(loaded)
    expected = model.get_encoder()(source_batch()).last_hidden_state
    assert_close(loaded(source_batch()).last_hidden_state, expected, torch.float32)
    loaded.save_pretrained(tmp_path / "encoder")
    _, info = load(AutoModelForTextEncoding, tmp_path / "encoder")
    assert not info["missing_keys"]


def test_the_bare_model_and_the_whole_load_each_other(
    saved: tuple[SparseqForConditionalGeneration, Path], tmp_path: Path
) -> None:
    model, folder = saved
    bare, info = load(AutoModel, folder)
    assert type(bare) is SparseqModel
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight", "final_logits_bias"}
    check_ties(bare)
    bare.save_pretrained(tmp_path / "bare")
    whole, info = load(AutoModelForSeq2SeqLM, tmp_path / "bare")
    # What the bare model has not is said to be missing; a tied head is not missing.
    assert ("lm_head.weight" in info["missing_keys"]) != model.config.tie_word_embeddings
    if model.config.tie_word_embeddings:
        assert_close(logits(whole), logits(model), torch.float32)


def test_bfloat16_loads_all_but_the_balancing_bias(saved: tuple[SparseqForConditionalGeneration, Path]) -> None:
    model, folder = saved
    loaded, _ = load(AutoModelForSeq2SeqLM, folder, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        expected = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == expected, name
    low = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), low[name]), name
    assert torch.isfinite(logits(loaded)).all()


def test_a_device_map_splits_and_offloads(saved: tuple[SparseqForConditionalGeneration, Path], tmp_path: Path) -> None:
    model, folder = saved
    automatic, _ = load(AutoModelForSeq2SeqLM, folder, device_map="auto")
    assert_close(logits(automatic), logits(model), torch.float32)
    # Without an accelerator, layers kept on disk stand for those on another device.
    parts = {"model.decoder.layers.1": "disk", "model.encoder.layers.0": "disk"}
    names = {name.removesuffix(".weight").removesuffix(".bias") for name in model.state_dict()}
    device_map = {name: "cpu" for name in names if not name.startswith(tuple(parts))} | parts
    split, _ = load(
        AutoModelForSeq2SeqLM, folder, device_map=device_map, offload_folder=tmp_path / "off", offload_buffers=True
    )
    assert split.model.decoder.layers[1].self_attn.q_proj.weight.is_meta, "kept on disk"
    assert_close(logits(split), logits(model), torch.float32)
    ids = source_batch()
    assert torch.equal(split.generate(ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6))


def test_weights_are_stored_once_and_only_as_safetensors(saved: Any) -> None:
    from safetensors import safe_open

    model, folder = saved
    assert {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt")} == set()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert "model.shared.weight" in names
    assert "model.encoder.embed_tokens.weight" not in names
    assert ("lm_head.weight" in names) != model.config.tie_word_embeddings


def test_a_model_made_on_the_meta_device_takes_weights_by_assignment(saved: Any) -> None:
    model, _ = saved
    with torch.device("meta"):
        empty = SparseqForConditionalGeneration(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    check_ties(empty)
    # Nothing is left behind on the meta device: positions are computed, not stored.
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    assert torch.equal(logits(empty.eval()), logits(model))


def test_copies_and_pickles_work_alike(saved: Any) -> None:
    model, _ = saved
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_ties(twin)
        assert torch.equal(logits(twin), logits(model))
