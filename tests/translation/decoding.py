"""Decoding with `generate()` and with a search over an engine, for tests that compare the two."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from sparseq import SparseqForConditionalGeneration
from sparseq.translation.backend import Batch, Hypothesis
from sparseq.translation.engine import Engine
from sparseq.translation.runtime_backend import RuntimeBackend
from tests.tiny import PAD, tiny_model

VOCAB = 40
ENDS = (2, 7, 11)
LENGTHS = (9, 6, 8, 3, 5)


def ending_model(seed: int = 3, bias: float = 2.0, **overrides: Any) -> SparseqForConditionalGeneration:
    """A model whose sentences end at different steps: the end of a sentence has a bias."""
    fields = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_num_key_value_heads": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_experts": 0,
        "initializer_range": 0.5,
        "final_logits_bias": True,
        "tie_word_embeddings": False,
    }
    model = tiny_model(seed, **{**fields, **overrides})
    # Less sure of itself, so that other tokens than the likeliest have a chance.
    model.lm_head.weight.data *= 0.6
    model.final_logits_bias[0, ENDS[0]] = bias
    return model


def settings_of(model: SparseqForConditionalGeneration, **changes: Any) -> GenerationConfig:
    """The model's settings with changes, and with 12 tokens at most unless they say something else."""
    settings = copy.deepcopy(model.generation_config)
    settings.max_length = None
    if "max_length" not in changes:
        changes = {"max_new_tokens": 12, **changes}
    settings.update(**changes)
    return settings


def sources(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Source ids of the given lengths, padded, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask + PAD * (1 - mask), mask


def decode(
    engine: Engine,
    settings: GenerationConfig,
    ids: torch.Tensor,
    mask: torch.Tensor,
    prefixes: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> list[list[Hypothesis]]:
    """With a search over an engine."""
    given = [[] for _ in ids] if prefixes is None else prefixes
    return RuntimeBackend(engine).decode(Batch(ids.numpy(), mask.numpy(), given), settings, **options)


def generate(
    model: SparseqForConditionalGeneration,
    settings: GenerationConfig,
    ids: torch.Tensor,
    mask: torch.Tensor,
    prefix: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """With `generate()`, all sentences with one prefix; scores as `Hypothesis` says."""
    own, model.generation_config = model.generation_config, settings
    start = settings.decoder_start_token_id
    starts = torch.tensor(start if isinstance(start, list) else [start] * len(ids))
    prompts = torch.cat([starts[:, None], torch.tensor(prefix, dtype=torch.int64).expand(len(ids), -1)], dim=1)
    options: dict[str, Any] = {} if isinstance(start, list) else {"decoder_input_ids": prompts}
    try:
        output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options)
        indices = getattr(output, "beam_indices", None)
        log_probs = model.compute_transition_scores(
            output.sequences, output.scores, indices, normalize_logits=indices is None
        )
    finally:
        model.generation_config = own
    ends = [settings.eos_token_id] if isinstance(settings.eos_token_id, int) else settings.eos_token_id or []
    best = settings.num_return_sequences or 1
    hypotheses = []
    for row, sequence in enumerate(output.sequences.tolist()):
        chosen = sequence[prompts.shape[1] :]
        end = next((place for place, token in enumerate(chosen) if token in ends), None)
        length = len(chosen) if end is None else end + 1
        own_log_probs = log_probs[row, :length].tolist()
        penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
        score = sum(own_log_probs) / length**penalty if indices is None else float(output.sequences_scores[row])
        tokens = [*prefix, *chosen[: length if end is None else end]]
        hypotheses.append(Hypothesis(tokens, score, own_log_probs))
    return [hypotheses[first : first + best] for first in range(0, len(hypotheses), best)]


def assert_same(actual: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    """Assert that tokens are equal, and scores up to rounding."""
    assert [[one.token_ids for one in found] for found in actual] == [[one.token_ids for one in e] for e in expected]
    for found, wanted in zip(actual, expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one.score, other.score, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(one.token_log_probs, other.token_log_probs, rtol=1e-4, atol=1e-4)
