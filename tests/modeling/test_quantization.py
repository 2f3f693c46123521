"""Int8 weights: what they compute, which weights they are, and what cannot be done with them."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    BitsAndBytesConfig,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.distributed import DistributedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparseq import SparseqForConditionalGeneration, SparseqInt8Config, quantization_sparseq
from sparseq.cli import main
from sparseq.loading import check_model_files, load_model
from sparseq.quantization_sparseq import Int8Experts, SparseqInt8Quantizer, dequantize_rows, quantize_rows
from tests.tiny import label_batch, source_batch, tiny_model
from tests.tolerances import assert_close

MODELS: dict[str, dict[str, Any]] = {
    "experts": {},
    "gated experts with biases": {"gated_ffn": True, "expert_bias": True, "ffn_bias": True, "attention_bias": True},
    "shared experts": {"num_shared_experts": 1, "gated_ffn": True},
    "dense": {"num_experts": 0},
    "dense beside sparse layers": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "untied": {"tie_word_embeddings": False, "final_logits_bias": True},
    "two embeddings": {"share_encoder_decoder_embeddings": False, "position_embedding_type": "learned"},
    "loss-free balancing": {"router_balancing": "loss_free", "router_scoring": "sigmoid"},
}
# What stays in floating point, as the names of parameters in a Sparseq model.
FLOATING = re.compile(r"norm\.(weight|bias)$|layernorm_embedding|\.router\.|bias$|embed_positions")


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in floating point."""
    tiny_model(**request.param).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """The folder of one sparse model in floating point."""
    tiny_model().save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def load_int8(folder: Path, **options: Any) -> SparseqForConditionalGeneration:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=SparseqInt8Config(), **options)
    assert isinstance(model, SparseqForConditionalGeneration)
    return model


def save_int8(folder: Path, **options: Any) -> Path:
    saved = folder.with_name("int8")
    load_int8(folder).save_pretrained(saved, **options)
    return saved


@torch.no_grad()
def dequantized(folder: Path, model: torch.nn.Module) -> SparseqForConditionalGeneration:
    """The model of `folder` in floating point with each int8 weight, row times scale, in the place of its own."""
    plain = SparseqForConditionalGeneration.from_pretrained(folder)
    state = model.state_dict()
    for name, parameter in plain.named_parameters():
        if (scale := state.get(f"{name}_scale")) is not None:
            for rows, int8, of_row in zip(
                parameter.flatten(0, -2), state[name].flatten(0, -2), scale.flatten(), strict=True
            ):
                rows.copy_(int8.float() * of_row)
    return plain


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of padded sources and targets."""
    output: torch.Tensor = model(input_ids=source_batch(), labels=label_batch()).logits
    return output


def generate(model: SparseqForConditionalGeneration) -> list[list[int]]:
    tokens: Any = model.generate(source_batch(), num_beams=3, max_length=16)
    return [list(map(int, row)) for row in tokens]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file is no mapping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_the_nearest_step_and_use_the_whole_range(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0] = 0
    int8, scale = quantize_rows(weight)
    assert (int8.dtype, int8.shape, scale.dtype, scale.shape) == (torch.int8, weight.shape, dtype, (3, 50))
    exact = int8.double() * scale.double()[..., None]
    assert ((exact - weight.double()).abs() <= scale.double()[..., None] * 0.5001).all()
    assert int8.int().abs().amax(dim=-1).flatten()[1:].eq(127).all()
    assert not exact[0, 0].any()
    assert_close(dequantize_rows(int8, scale), exact, dtype)


def test_computes_what_the_dequantized_weights_do(folder: Path) -> None:
    model = load_int8(folder)
    plain = dequantized(folder, model)
    assert_close(logits(model), logits(plain), torch.float32)
    assert generate(model) == generate(plain)
    assert not torch.equal(logits(model), logits(SparseqForConditionalGeneration.from_pretrained(folder)))


def test_every_weight_is_int8_but_norms_routers_biases_and_positions(folder: Path) -> None:
    """To the byte, in memory and on disk; a parameter that a later layer brings is int8 or named above."""
    plain = SparseqForConditionalGeneration.from_pretrained(folder)
    stored = {name: p for name, p in plain.named_parameters() if not FLOATING.search(name)}
    assert {name.rpartition(".")[2] for name in stored} <= {"weight", "gate_up_proj", "up_proj", "down_proj"}
    saved = sum(3 * p.numel() - 4 * p.shape[:-1].numel() for p in stored.values())
    model = load_int8(folder)
    assert model.get_memory_footprint() == plain.get_memory_footprint() - saved
    on_disk = tensors(save_int8(folder))
    assert {name for name, tensor in on_disk.items() if tensor.dtype == torch.int8} == stored.keys()
    assert (
        sum(t.numel() * t.element_size() for t in on_disk.values())
        == sum(t.numel() * t.element_size() for t in tensors(folder).values()) - saved
    )


def test_a_saved_model_loads_as_it_was(folder: Path) -> None:
    model = load_int8(folder)
    again, report = SparseqForConditionalGeneration.from_pretrained(save_int8(folder), output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again), logits(model))
    assert generate(again) == generate(model)
    tied = again.config.tie_word_embeddings
    assert (again.lm_head.weight_scale is again.model.decoder.embed_tokens.weight_scale) == tied
    again.tie_weights()
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(folder.with_name("second"))
    assert (folder.with_name("second") / "model.safetensors").read_bytes() == (
        folder.with_name("int8") / "model.safetensors"
    ).read_bytes()


def test_shards_hold_the_same(sparse: Path) -> None:
    model = load_int8(sparse)
    saved = save_int8(sparse, max_shard_size="20KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 2
    check_model_files(saved, may_be_int8=True)
    assert torch.equal(logits(load_model(AutoModelForSeq2SeqLM, saved)), logits(model))


def test_the_encoder_alone_loads_from_the_whole(sparse: Path) -> None:
    model = load_int8(sparse)
    encoder, report = AutoModelForTextEncoding.from_pretrained(save_int8(sparse), output_loading_info=True)
    assert not any(report.values())
    ids = source_batch()
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, model.get_encoder()(ids).last_hidden_state)


def test_bfloat16_keeps_scales_and_outputs_in_its_type(sparse: Path) -> None:
    for model in (load_int8(sparse, dtype=torch.bfloat16), load_int8(sparse).to(torch.bfloat16)):
        assert model.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {torch.int8, torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16
        plain = dequantized(sparse, model).to(torch.bfloat16)
        assert_close(logits(model), logits(plain), torch.bfloat16)
    saved = sparse.with_name("bfloat16")
    model.save_pretrained(saved)
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(saved)), logits(model))


def test_only_chosen_experts_become_floating_point(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def record(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        shapes.append(weight.shape)
        return dequantize_rows(weight, scale)

    monkeypatch.setattr(quantization_sparseq, "dequantize_rows", record)
    experts = load_int8(sparse).model.decoder.layers[0].mlp.experts
    assert isinstance(experts, Int8Experts)
    # Two tokens and padding; experts 1 and 3 of four.
    chosen = torch.tensor([[3, 1], [1, 3], [4, 4]])
    output = experts(torch.ones(3, 32), chosen, torch.full((3, 2), 0.5))
    assert len(shapes) == 4
    assert all(len(shape) == 2 for shape in shapes)
    assert torch.equal(output[2], torch.zeros(32))


def test_a_traced_model_computes_the_same(sparse: Path) -> None:
    """As on an accelerator, where no program may depend on which experts were chosen."""
    model = load_int8(sparse)
    ids = source_batch()
    inputs = {"attention_mask": ids.ne(0).long(), "decoder_input_ids": source_batch(seed=3), "use_cache": False}
    exported = torch.export.export(model, (ids,), inputs, strict=False).module()
    with torch.no_grad():
        assert_close(exported(ids, **inputs).logits, model(ids, **inputs).logits, torch.float32)


def test_large_weights_become_floating_point_in_pieces(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logits(load_int8(sparse))
    monkeypatch.setattr(quantization_sparseq, "_LARGE_WEIGHT", 100)
    monkeypatch.setattr(quantization_sparseq, "_PIECE", 32 * 7)
    assert_close(logits(load_int8(sparse)), whole, torch.float32)


def test_a_dictionary_asks_for_the_same(sparse: Path) -> None:
    """For who loads a folder's own code, and has no class to name."""
    model = AutoModelForSeq2SeqLM.from_pretrained(sparse, quantization_config={"quant_method": "sparseq_int8"})
    assert torch.equal(logits(model), logits(load_int8(sparse)))


def marian(folder: Path) -> None:
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    ids = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    MarianMTModel(MarianConfig(vocab_size=20, **sizes, **layers, **ids, **heads)).save_pretrained(folder)
    load_int8(folder)


def distributed(_: Path) -> None:
    model = tiny_model()
    # As from_pretrained() leaves it, which would first look for the other processes.
    model.config.distributed_config = DistributedConfig(tp_size=2, ep_size=2)
    SparseqInt8Quantizer(SparseqInt8Config()).preprocess_model(model)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another model": (marian, "for models of type 'sparseq', but this one is 'marian'"),
    "another method": (lambda _: SparseqInt8Config("int4"), "is 'sparseq_int8', but 'int4' was given"),
    "two methods": (
        lambda folder: AutoModelForSeq2SeqLM.from_pretrained(
            save_int8(folder), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        ),
        "quantized with SparseqInt8Config but you are passing a BitsAndBytesConfig",
    ),
    "several processes": (distributed, "Int8 weights cannot be distributed"),
    "training": (
        lambda folder: Seq2SeqTrainer(
            load_int8(folder), Seq2SeqTrainingArguments(str(folder.with_name("run")), use_cpu=True, report_to=[])
        ),
        "cannot perform fine-tuning on purely quantized models",
    ),
    "adapters of projections": (
        lambda folder: get_peft_model(load_int8(folder), LoraConfig(target_modules=["q_proj"])),
        "Int8Linear.* is not supported",
    ),
    "adapters of experts": (
        lambda folder: logits(
            get_peft_model(
                load_int8(folder), LoraConfig(target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)
            )
        ),
        "Int8 experts take no adapters",
    ),
}


@pytest.mark.parametrize(("attempt", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(attempt: Callable[[Path], object], message: str, sparse: Path) -> None:
    with pytest.raises(ValueError, match=message):
        attempt(sparse)


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.shared.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    # The library collects what fails while it loads, and reports it by the weight's name.
    with pytest.raises(RuntimeError, match="CONVERSION"):
        load_int8(tmp_path)


def test_commands_that_change_weights_refuse_int8(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = save_int8(sparse)
    with pytest.raises(ValueError, match="has int8 weights, which PyTorch can run and nothing can change"):
        check_model_files(saved)
    for command in (
        ["upcycle", str(saved), str(sparse.with_name("new")), "--experts", "8"],
        ["densify", str(saved), str(sparse.with_name("new")), "--experts", "mean"],
        ["average", str(saved), str(sparse), "--output", str(sparse.with_name("new"))],
    ):
        assert main(command) == 2
        assert "is quantized" in capsys.readouterr().err
    assert not sparse.with_name("new").exists()


class Other(HfQuantizer):
    """A quantizer that reaches nothing."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@pytest.mark.parametrize("experts", [0, 4])
def test_other_quantizers_are_warned_of_where_there_are_experts(
    experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "other", Other)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # added by transformers
    tiny_model(num_experts=experts).save_pretrained(tmp_path)
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=QuantizationConfigMixin("other"))
    assert ("'other', which may leave the weights of 4 experts" in caplog.text) == bool(experts)
    caplog.clear()
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # added by transformers
    load_int8(tmp_path)
    assert "may leave" not in caplog.text


def test_active_parameters_are_counted_as_those_of_the_model_in_floating_point(sparse: Path) -> None:
    plain, model = SparseqForConditionalGeneration.from_pretrained(sparse), load_int8(sparse)
    idle = plain.num_parameters() - plain.num_active_parameters()
    scales = sum(p.numel() for name, p in model.named_parameters() if re.search(r"experts\..*_scale$", name))
    assert model.num_parameters() - model.num_active_parameters() == idle + scales // 2


def test_weights_that_others_quantized_are_refused_by_name(sparse: Path) -> None:
    config = json.loads((sparse / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (sparse / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="quantized with 'gptq'"):
        check_model_files(sparse, may_be_int8=True)
