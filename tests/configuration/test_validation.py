"""Every wrong value and every contradiction is refused, with the fields and their values in the message."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from sparseq import SparseqConfig, SparseqModel

# One head everywhere, so that the width alone is wrong.
ONE_HEAD = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
ONE_HEAD |= {"encoder_num_key_value_heads": 1, "decoder_num_key_value_heads": 1}

AT_LEAST_ONE = [
    *("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads"),
    *("decoder_attention_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "expert_ffn_dim", "num_experts_per_tok", "max_position_embeddings"),
]
NOT_NEGATIVE = [
    *("num_experts", "encoder_sparse_step", "decoder_sparse_step", "num_shared_experts", "position_offset"),
    *("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"),
]
PROBABILITIES = [
    *("dropout", "attention_dropout", "activation_dropout", "expert_dropout", "label_smoothing"),
    *("router_jitter_noise", "expert_output_masking"),
]
CHOICES = [
    *("position_embedding_type", "sinusoidal_layout", "sinusoidal_spacing", "norm_type", "norm_position"),
    *("router_scoring", "router_balancing", "router_balancing_scope"),
]
WRONG_TYPES: list[tuple[str, Any]] = [
    ("d_model", 512.0),
    ("d_model", "512"),
    ("encoder_layers", None),
    ("vocab_size", True),
    ("dropout", "0.1"),
    ("dropout", None),
    ("norm_eps", 1),
    ("gated_ffn", 1),
    ("tie_word_embeddings", "yes"),
    ("num_experts", 8.0),
    ("activation_function", None),
    ("rope_parameters", "default"),
    ("eos_token_id", [2, "3"]),
    ("decoder_start_token_id", None),
    ("label_smoothing", "0.1"),
]

# Fields, and what the message must say: the names and the values.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "encoder heads": ({"encoder_attention_heads": 7}, ["`d_model`", "`encoder_attention_heads` (7)", "512"]),
    "decoder heads": ({"d_model": 520, "decoder_attention_heads": 16}, ["`decoder_attention_heads` (16)", "520"]),
    "encoder key-value heads": (
        {"encoder_num_key_value_heads": 3},
        ["`encoder_attention_heads`", "`encoder_num_key_value_heads` (3)", "is 8", "None"],
    ),
    "more key-value heads than heads": (
        {"decoder_num_key_value_heads": 16},
        ["`decoder_attention_heads`", "`decoder_num_key_value_heads` (16)", "is 8"],
    ),
    "sinusoid of odd width": (
        ONE_HEAD | {"position_embedding_type": "sinusoidal", "d_model": 33},
        ['`position_embedding_type="sinusoidal"`', "`d_model`", "even", "33"],
    ),
    "sinusoid too narrow": (
        ONE_HEAD | {"position_embedding_type": "sinusoidal", "sinusoidal_spacing": "tensor2tensor", "d_model": 2},
        ['`sinusoidal_spacing="tensor2tensor"`', "`d_model`", "4", "is 2"],
    ),
    "learned without a length": (
        {"position_embedding_type": "learned", "max_position_embeddings": None},
        ['`position_embedding_type="learned"`', "`max_position_embeddings`", "None"],
    ),
    "odd rotary head": (
        {"d_model": 24, "decoder_num_key_value_heads": 4},
        ['`position_embedding_type="rotary"`', "`d_model / encoder_attention_heads`", "24 / 8 is 3"],
    ),
    "odd rotary head of the decoder": (
        {"d_model": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 8},
        ["`d_model / decoder_attention_heads`", "24 / 8 is 3"],
    ),
    "unknown rotary kind": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ['`rope_parameters["rope_type"]`', '"default"', '"linear"', '"dynamic"'],
    ),
    "linear without a factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        ['`rope_parameters["factor"]`', '"linear"', "None"],
    ),
    "factor below 1": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
        ['`rope_parameters["factor"]`', "at least 1", "0.5"],
    ),
    "factor that is no number": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}},
        ['`rope_parameters["factor"]`', "a number", "'2'"],
    ),
    "negative theta": (
        {"rope_parameters": {"rope_theta": -5.0}},
        ['`rope_parameters["rope_theta"]`', "above 0", "-5.0"],
    ),
    "norm_eps that is no number": ({"norm_eps": float("nan")}, ["`norm_eps`", "finite", "nan"]),
    "infinite coefficient": ({"router_aux_loss_coef": float("inf")}, ["`router_aux_loss_coef`", "finite", "inf"]),
    "decoder only": ({"is_encoder_decoder": False}, ["`is_encoder_decoder`", "False"]),
    "activation with parameters": ({"activation_function": "prelu"}, ["`activation_function`", "'prelu'", "'relu'"]),
    "more experts per token than experts": (
        {"num_experts": 4, "num_experts_per_tok": 5},
        ["`num_experts_per_tok`", "`num_experts` (4)", "is 5"],
    ),
    "shared experts of a dense model": (
        {"num_experts": 0, "num_shared_experts": 2},
        ["`num_shared_experts` (2)", "`num_experts` is 0"],
    ),
    "no sparse layer: steps too long": (
        {"encoder_layers": 3, "decoder_layers": 2, "encoder_sparse_step": 4, "decoder_sparse_step": 5},
        ["`num_experts` is 8", "`encoder_sparse_step` (4)", "`decoder_sparse_step` (5)", "3 and 2", "`num_experts=0`"],
    ),
    "no sparse layer: steps 0": (
        {"encoder_sparse_step": 0, "decoder_sparse_step": 0},
        ["`num_experts` is 8", "`encoder_sparse_step` (0)", "`decoder_sparse_step` (0)"],
    ),
    "router without a gradient": (
        {"num_experts_per_tok": 1},
        ["`norm_topk_prob=True`", "`num_experts_per_tok=1`", "`norm_topk_prob=False`"],
    ),
    "unknown activation": ({"activation_function": "swigloo"}, ["`activation_function`", "'silu'", "'swigloo'"]),
    "no room for norm_eps": ({"norm_eps": 0.0}, ["`norm_eps`", "above 0", "0.0"]),
    "negative initializer_range": ({"initializer_range": -0.02}, ["`initializer_range`", "None", "-0.02"]),
}


def refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(StrictDataclassError) as caught:
        SparseqConfig(**fields)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_sizes_below_one_are_refused(name: str, value: int) -> None:
    message = refusal({name: value})
    assert f"`{name}` must be at least 1" in message
    assert f"is {value}" in message


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_negative_numbers_are_refused(name: str) -> None:
    assert f"`{name}` must not be negative, but is -1" in refusal({name: -1})


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, float("nan")])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_out_of_range_are_refused(name: str, value: float) -> None:
    assert f"`{name}` must be at least 0 and below 1, but is {value}" in refusal({name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choices_are_refused(name: str) -> None:
    message = refusal({name: "another"})
    assert name in message
    assert "another" in message
    # What would be right.
    assert SparseqConfig.__dataclass_fields__[name].default in message


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_types_are_refused(name: str, value: Any) -> None:
    message = refusal({name: value})
    assert name in message
    assert "expected" in message


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case: str) -> None:
    fields, parts = CONTRADICTIONS[case]
    message = refusal(fields)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("value", [-1, 100, [2, 100]])
@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"])
def test_tokens_outside_the_vocabulary_are_refused(name: str, value: Any) -> None:
    if isinstance(value, list) and name != "eos_token_id":
        assert name in refusal({"vocab_size": 100, name: value})
        return
    wrong = value[-1] if isinstance(value, list) else value
    message = refusal({"vocab_size": 100, name: value})
    assert f"`{name}` must be in [0, `vocab_size` (100)), but is {wrong}" in message


@pytest.mark.parametrize(
    "fields",
    [
        ONE_HEAD | {"d_model": 33, "position_embedding_type": "none"},
        ONE_HEAD | {"d_model": 33, "position_embedding_type": "learned"},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts": 0, "encoder_sparse_step": 0, "decoder_sparse_step": 0},
        {"encoder_sparse_step": 0},
        {"dropout": 0, "router_aux_loss_coef": 0, "router_z_loss_coef": 0},
        {"eos_token_id": [2, 3], "pad_token_id": None, "bos_token_id": None},
        {"max_position_embeddings": None},
        {"initializer_range": 0.02},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1}},
        {"position_embedding_type": "sinusoidal", "d_model": 24, "sinusoidal_spacing": "tensor2tensor"},
    ],
)
def test_unusual_but_sound_configurations_are_accepted(fields: dict[str, Any]) -> None:
    config = SparseqConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_a_field_that_is_set_later_is_checked_too() -> None:
    config = SparseqConfig()
    with pytest.raises(StrictDataclassError, match="num_experts"):
        config.num_experts = "eight"
    config.num_experts_per_tok = 9
    with pytest.raises(StrictDataclassError, match="num_experts_per_tok"):
        config.validate()


def test_a_model_checks_what_was_changed_since() -> None:
    config = SparseqConfig()
    config.num_experts_per_tok = 9
    with torch.device("meta"), pytest.raises(ValueError, match=r"`num_experts_per_tok`.*\(8\), but is 9"):
        SparseqModel(config)


def test_sizes_that_the_library_cannot_group_fall_back() -> None:
    config = SparseqConfig(d_model=48, expert_ffn_dim=30, encoder_layers=2, decoder_layers=2)
    with torch.device("meta"):
        model = SparseqModel._from_config(config, experts_implementation="grouped_mm")
    assert model.config._experts_implementation == "sparseq"
