"""Derived defaults, a lossless round trip, and parameter counts that equal the built model's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from sparseq import SparseqConfig, SparseqForConditionalGeneration
from sparseq.modeling_sparseq import SparseqExperts

# A value other than the default for every field of ours.
CHANGED: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    "encoder_num_key_value_heads": 3,
    "decoder_num_key_value_heads": 1,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "activation_function": "gelu",
    "gated_ffn": False,
    "dropout": 0.25,
    "attention_dropout": 0.1,
    "activation_dropout": 0.05,
    "position_embedding_type": "learned",
    "max_position_embeddings": 77,
    "position_offset": 2,
    "sinusoidal_layout": "halves",
    "sinusoidal_spacing": "tensor2tensor",
    "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    "norm_type": "layernorm",
    "norm_position": "post",
    "norm_eps": 1e-5,
    "embedding_norm": True,
    "final_norm": True,
    "scale_embedding": False,
    "tie_word_embeddings": False,
    "share_encoder_decoder_embeddings": False,
    "attention_bias": True,
    "ffn_bias": True,
    "expert_bias": True,
    "final_logits_bias": True,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 0,
    "expert_ffn_dim": 20,
    "num_shared_experts": 2,
    "router_scoring": "sigmoid",
    "norm_topk_prob": False,
    "router_jitter_noise": 0.02,
    "expert_dropout": 0.3,
    "expert_output_masking": 0.15,
    "router_balancing": "loss_free",
    "router_balancing_scope": "batch",
    "router_aux_loss_coef": 0.02,
    "router_z_loss_coef": 0.003,
    "router_bias_update_rate": 0.01,
    "label_smoothing": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "decoder_start_token_id": 7,
    "use_cache": False,
    "output_router_logits": True,
}
# `is_encoder_decoder` can only be True.
FIXED = {"is_encoder_decoder"}


def own_fields() -> set[str]:
    return {name for name in SparseqConfig.__annotations__ if not name.startswith("_")} - FIXED


def values(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in own_fields()}


def test_the_changed_configuration_changes_every_field() -> None:
    assert CHANGED.keys() == own_fields()
    default = values(SparseqConfig())
    assert [name for name in CHANGED if CHANGED[name] == default[name] and name != "final_norm"] == []


def test_every_field_is_documented() -> None:
    documentation = SparseqConfig.__doc__ or ""
    arguments = documentation.split("Args:")[1].split("Raises:")[0]
    assert [name for name in own_fields() if name not in arguments] == []


@pytest.mark.parametrize("fields", [{}, CHANGED, {"pad_token_id": None, "max_position_embeddings": None}])
def test_round_trip_through_json_loses_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    config = SparseqConfig(**fields)
    for use_diff in (True, False):
        from_json = SparseqConfig(**json.loads(config.to_json_string(use_diff=use_diff)))
        assert values(from_json) == values(config)
        assert from_json.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for loaded in (SparseqConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, SparseqConfig)
        assert values(loaded) == values(config)
        # The path it came from aside.
        assert loaded.to_diff_dict() == config.to_diff_dict()


def test_fields_can_be_overridden_on_loading(tmp_path: Path) -> None:
    SparseqConfig(**CHANGED).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, dropout=0.3, label_smoothing=0.0)
    assert values(config) == CHANGED | {"dropout": 0.3, "label_smoothing": 0.0}
    with pytest.raises(StrictDataclassError, match="dropout"):
        AutoConfig.from_pretrained(tmp_path, dropout="0.3")


def test_experts_implementation_is_not_saved() -> None:
    # It belongs to the machine that runs the model.
    config = SparseqConfig()
    config._experts_implementation = "eager"
    assert "eager" not in config.to_json_string(use_diff=False)


@pytest.mark.parametrize(
    ("fields", "derived"),
    [
        ({"encoder_num_key_value_heads": None}, {"encoder_num_key_value_heads": 8, "decoder_num_key_value_heads": 4}),
        ({"decoder_num_key_value_heads": None, "decoder_attention_heads": 16}, {"decoder_num_key_value_heads": 16}),
        ({"norm_position": "pre"}, {"final_norm": True}),
        ({"norm_position": "post"}, {"final_norm": False}),
        ({"norm_position": "pre", "final_norm": False}, {"final_norm": False}),
        ({"norm_position": "post", "final_norm": True}, {"final_norm": True}),
        ({"encoder_ffn_dim": 96, "num_experts_per_tok": 3}, {"expert_ffn_dim": 32}),
        ({"encoder_ffn_dim": 2, "num_experts_per_tok": 4}, {"expert_ffn_dim": 1}),
        ({"expert_ffn_dim": 48}, {"expert_ffn_dim": 48}),
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ],
)
def test_derived_defaults(fields: dict[str, Any], derived: dict[str, Any]) -> None:
    config = SparseqConfig(**fields)
    assert {name: getattr(config, name) for name in derived} == derived


@pytest.mark.parametrize(
    ("layers", "step", "sparse"),
    [(6, 2, [1, 3, 5]), (6, 1, [0, 1, 2, 3, 4, 5]), (5, 3, [2]), (4, 4, [3]), (3, 4, []), (6, 0, [])],
)
def test_sparse_layers(layers: int, step: int, sparse: list[int]) -> None:
    config = SparseqConfig(encoder_layers=layers, encoder_sparse_step=step, decoder_layers=2, decoder_sparse_step=2)
    assert config.sparse_layers("encoder") == sparse
    assert config.sparse_layers("decoder") == [1]
    dense = SparseqConfig(encoder_layers=layers, encoder_sparse_step=step, num_experts=0)
    assert dense.sparse_layers("encoder") == dense.sparse_layers("decoder") == []


def test_names_of_other_models_work() -> None:
    config = SparseqConfig(
        **{name: CHANGED[name] for name in ("d_model", "encoder_layers", "num_experts")}
        | {"encoder_attention_heads": 6, "decoder_attention_heads": 4, "encoder_num_key_value_heads": 6}
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 6)
    # Caches read the decoder's shape under these names.
    decoder = config.get_text_config(decoder=True)
    assert (decoder.num_hidden_layers, decoder.num_key_value_heads) == (config.decoder_layers, 4)


# What each adds to a small sparse model.
COUNTED: dict[str, dict[str, Any]] = {
    "default": {},
    "changed everywhere": CHANGED,
    "dense": {"num_experts": 0},
    "dense, plain, biased": {"num_experts": 0, "gated_ffn": False, "ffn_bias": True, "attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "unshared": {"share_encoder_decoder_embeddings": False},
    "untied and unshared": {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": False},
    "multi-query": {"encoder_num_key_value_heads": 1, "decoder_num_key_value_heads": 1, "attention_bias": True},
    "multi-head": {"encoder_num_key_value_heads": None, "decoder_num_key_value_heads": None},
    "different heads": {"encoder_num_key_value_heads": 4, "decoder_attention_heads": 2, "attention_bias": True}
    | {"decoder_num_key_value_heads": 1},
    "layernorm, post": {"norm_type": "layernorm", "norm_position": "post"},
    "all norms": {"norm_type": "layernorm", "embedding_norm": True, "final_norm": True},
    "no final norm": {"final_norm": False, "embedding_norm": True},
    "learned positions": {"position_embedding_type": "learned", "max_position_embeddings": 50},
    "learned positions with an offset": {"position_embedding_type": "learned", "position_offset": 2},
    "sinusoidal positions": {"position_embedding_type": "sinusoidal"},
    "every layer sparse": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_experts": 3},
    "sparse encoder": {"decoder_sparse_step": 0, "encoder_sparse_step": 3},
    "sparse decoder": {"encoder_sparse_step": 0, "expert_ffn_dim": 10},
    "top-1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "top-E": {"num_experts_per_tok": 4, "num_experts": 4},
    "plain experts": {"gated_ffn": False},
    "plain experts with biases": {"gated_ffn": False, "expert_bias": True},
    "gated experts with biases": {"expert_bias": True},
    "shared experts": {"num_shared_experts": 2},
    "shared experts with biases": {"num_shared_experts": 1, "ffn_bias": True, "gated_ffn": False},
    "loss-free balancing": {"router_balancing": "loss_free"},
    "final logits bias": {"final_logits_bias": True},
}
SMALL: dict[str, Any] = {"vocab_size": 91, "d_model": 16, "encoder_layers": 3, "decoder_layers": 4}
SMALL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_num_key_value_heads": 2}
SMALL |= {"decoder_num_key_value_heads": 2, "encoder_ffn_dim": 28, "decoder_ffn_dim": 20, "num_experts": 5}


def count_parameters(model: SparseqForConditionalGeneration, active: bool) -> int:
    """Tied parameters once; with `active`, of the experts only those that one token chooses."""
    config, total = model.config, sum(parameter.numel() for parameter in model.parameters())
    if active:
        for module in model.modules():
            if isinstance(module, SparseqExperts):
                for parameter in module.parameters():
                    assert parameter.shape[0] == config.num_experts
                    total -= parameter[0].numel() * (config.num_experts - config.num_experts_per_tok)
    return total


@pytest.mark.parametrize("case", COUNTED)
def test_parameter_counts_equal_the_built_models(case: str) -> None:
    config = SparseqConfig(**(SMALL | COUNTED[case]))
    with torch.device("meta"):
        model = SparseqForConditionalGeneration(config)
    assert config.num_parameters() == count_parameters(model, active=False) == model.num_parameters()
    assert config.num_parameters(active=True) == count_parameters(model, active=True) == model.num_active_parameters()
    if config.num_experts == 0 or config.num_experts_per_tok == config.num_experts:
        assert config.num_parameters(active=True) == config.num_parameters()
    else:
        assert config.num_parameters(active=True) < config.num_parameters()


def test_a_sparse_layer_has_the_active_size_of_a_dense_one() -> None:
    # What the default of `expert_ffn_dim` promises; the router comes on top.
    sparse = SparseqConfig(**(SMALL | {"decoder_ffn_dim": 28}))
    dense = SparseqConfig(**(SMALL | {"decoder_ffn_dim": 28, "num_experts": 0}))
    routers = len(sparse.sparse_layers("encoder") + sparse.sparse_layers("decoder")) * 5 * 16
    assert sparse.num_parameters(active=True) == dense.num_parameters() + routers
