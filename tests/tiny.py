"""Tiny random models and batches that the tests share."""

from typing import Any

import torch

from sparseq import SparseqConfig, SparseqForConditionalGeneration

PAD = 0
VOCAB = 60


def tiny_config(**overrides: Any) -> SparseqConfig:
    """Sparse in every layer, grouped queries in both stacks, no dropout; large weights, so that outputs vary."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_num_key_value_heads": 2,
        "decoder_num_key_value_heads": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 64,
        "num_experts": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    }
    return SparseqConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> SparseqForConditionalGeneration:
    """A model in evaluation mode, the same for the same arguments."""
    torch.manual_seed(seed)
    return SparseqForConditionalGeneration(tiny_config(**overrides)).eval()


def source_batch(lengths: tuple[int, ...] = (9, 6, 8), seed: int = 1) -> torch.Tensor:
    """Source ids of the given lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length:] = PAD
    return ids


def label_batch(lengths: tuple[int, ...] = (7, 5, 4), seed: int = 2) -> torch.Tensor:
    """Labels of the given lengths, -100 behind them."""
    ids = source_batch(lengths, seed)
    return ids.masked_fill(ids == PAD, -100)
