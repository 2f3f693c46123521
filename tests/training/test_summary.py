from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparseq.training.summary import training_flops
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts": 0},
        {"num_experts": 0, "gated_ffn": False, "tie_word_embeddings": False},
        {"num_experts_per_tok": 3, "decoder_sparse_step": 2, "num_shared_experts": 2},
        {"gated_ffn": False, "encoder_num_key_value_heads": 4, "encoder_layers": 3, "expert_ffn_dim": 20},
    ],
)
def test_operations_of_a_token_are_those_that_torch_counts(overrides: dict[str, Any]) -> None:
    # The loop over experts is made of products that the counter knows.
    model = tiny_model(**overrides).train()
    model.set_experts_implementation("eager")

    def count(source: int, target: int) -> int:
        ids, labels = torch.randint(3, 60, (2, source)), torch.randint(3, 60, (2, target))
        # Inputs that need a gradient, because the rule also counts the one into the embeddings.
        with FlopCounterMode(display=False) as counter:
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            into = model.get_input_embeddings()(labels).detach().requires_grad_()
            model(inputs_embeds=embedded, decoder_inputs_embeds=into, labels=labels).loss.backward()
        products = counter.get_flop_counts()["Global"]
        return sum(products.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm))

    source, target = training_flops(model.config)
    assert count(9, 5) == 2 * (9 * source + 5 * target)
    assert count(4, 7) == 2 * (4 * source + 7 * target)
