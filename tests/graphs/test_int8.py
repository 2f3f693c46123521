"""Graphs in 8 bits: near the model, small, and with every large weight in 8 bits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from sparseq.graphs.files import export_graphs
from tests.graphs.exported import ExportedModel
from tests.tiny import VOCAB, source_batch, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 0},
    "dense, relu, biases": {"num_experts": 0, "gated_ffn": False, "activation_function": "relu", "ffn_bias": True},
    "gated experts": {"expert_bias": True, "num_shared_experts": 1},
    "plain experts": {"gated_ffn": False, "activation_function": "relu"},
    "GELU experts": {"gated_ffn": False, "activation_function": "gelu", "router_scoring": "sigmoid"},
    "gated GELU experts, one by one": {"activation_function": "gelu"},
    "experts of an odd width": {"d_model": 40, "expert_ffn_dim": 12},
}


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near_the_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    export_graphs(model, tmp_path / "graphs", precision="int8")
    source, target = source_batch(), source_batch((7, 7, 7), seed=3)
    mask = source.ne(0).long()
    logits, _ = ExportedModel(tmp_path / "graphs").decode(source.numpy(), mask.numpy(), target.numpy(), 2)
    with torch.no_grad():
        expected = model(source, attention_mask=mask, decoder_input_ids=target).logits[:, 1:].numpy()
    error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
    # Unquantized, it is 1e-6; a wrong scale or order of the weights makes it about 1.
    assert 1e-4 < error < 0.08


@pytest.mark.parametrize("kind", ["dense", "gated experts", "gated GELU experts, one by one"])
def test_every_large_weight_is_in_8_bits(kind: str, tmp_path: Path) -> None:
    model = tiny_model(d_model=64, vocab_size=VOCAB, **KINDS[kind])
    export_graphs(model, tmp_path / "graphs", precision="int8")
    for path in (tmp_path / "graphs").glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            is_router = tensor.name.endswith(".router")
            if np.prod(tensor.dims) >= 1024 and not is_router:
                assert tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8), tensor.name
