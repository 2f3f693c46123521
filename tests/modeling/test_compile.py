"""torch.compile traces the whole model into one graph, in evaluation and in training."""

from typing import Any

import pytest
import torch

from tests.tiny import label_batch, source_batch, tiny_model
from tests.tolerances import assert_close

CASES: list[dict[str, Any]] = [
    {},
    {"num_experts": 0, "position_embedding_type": "sinusoidal", "norm_position": "post", "norm_type": "layernorm"},
    {"position_embedding_type": "learned", "gated_ffn": False, "expert_bias": True, "num_shared_experts": 1},
    {"router_scoring": "sigmoid", "router_balancing": "loss_free", "position_embedding_type": "none"},
]


@pytest.mark.parametrize("overrides", CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_fullgraph(overrides: dict[str, Any], mode: str) -> None:
    model = tiny_model(**overrides)
    model.train(mode == "train")
    inputs = {"input_ids": source_batch(), "labels": label_batch()}
    torch._dynamo.reset()
    # aot_eager traces forward and backward as inductor does, without its minutes of code generation.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        output = forward(**inputs)
        if mode == "train":
            output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": output.loss, "logits": output.logits, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, torch.float32, name)


def test_one_graph_serves_many_lengths() -> None:
    model = tiny_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (5, 7, 11):
        ids = source_batch((length, length - 1))
        assert_close(
            compiled(input_ids=ids, decoder_input_ids=ids).logits,
            model(input_ids=ids, decoder_input_ids=ids).logits,
            torch.float32,
        )
