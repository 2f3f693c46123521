"""A Sparseq model as programs of torch.export: plain tensors in and out, operators of torch alone, any sizes.

The exporters of transformers trace the model as well, but without its encoder, and their programs take the library's
caches, so that they load only beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, EncoderDecoderCache

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.conversion.likelihood import position_limit
from sparseq.modeling_sparseq import SparseqForConditionalGeneration

# Tracing takes 0 and 1 for constants; from 2 on any sizes would do, if they differ, so that none stands for another.
_BATCH, _SOURCE, _TARGET, _PAST = 2, 7, 3, 5


class EncoderProgram(nn.Module):
    """Sources to what the decoder needs of them, computed once a source."""

    def __init__(self, model: SparseqForConditionalGeneration):
        super().__init__()
        self.encoder = model.model.encoder
        attentions: list[Any] = [layer.encoder_attn for layer in model.model.decoder.layers]
        self.projections = nn.ModuleList(
            one for attention in attentions for one in (attention.k_proj, attention.v_proj)
        )
        self.head_dim = head_dim(model.config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            input_ids: `(B, S)` int64.
            attention_mask: `(B, S)` int64, 0 for padding.

        Returns:
            Cross-attention's keys and values of each decoder layer, by turns, each `(B, K, S, D)`.
        """
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return [one(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in self.projections]


class DecoderProgram(nn.Module):
    """Target tokens to logits: all at once (prefill) or one after the other (step), with a cache of those before."""

    def __init__(self, model: SparseqForConditionalGeneration):
        super().__init__()
        # Not the whole model: a program stores all weights of its module.
        self.decoder = model.model.decoder
        self.lm_head = model.lm_head
        self.final_logits_bias = model.final_logits_bias

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        self_cache: list[torch.Tensor],
        cross_cache: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            decoder_input_ids: `(B, T)` int64, those after what `self_cache` holds.
            attention_mask: `(B, S)` int64 of the source, 0 for padding.
            self_cache: Keys and values of each layer by turns, each `(B, K, P, D)`; P is 0 at the beginning.
            cross_cache: Of `EncoderProgram`.

        Returns:
            Logits `(B, T, V)`, and the cache for the next call, with T more positions.
        """
        output = self.decoder(
            input_ids=decoder_input_ids,
            # Only its sizes are read, since the cache has all that is made of it.
            encoder_hidden_states=cross_cache[0][:, 0],
            encoder_attention_mask=attention_mask,
            past_key_values=EncoderDecoderCache(_cache(self_cache), _cache(cross_cache)),
            use_cache=True,
        )
        logits = self.lm_head(output.last_hidden_state)
        if self.final_logits_bias is not None:
            logits = logits + self.final_logits_bias
        layers = output.past_key_values.self_attention_cache.layers
        return logits, [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _cache(tensors: Sequence[torch.Tensor]) -> DynamicCache:
    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def export_programs(model: SparseqForConditionalGeneration) -> dict[str, ExportedProgram]:
    """The programs "encoder" and "decoder" of a model, for any batch, lengths and, where positions are not learned,
    sources and targets as long as memory allows.

    Args:
        model: In evaluation mode, on the CPU. Its experts are computed one after the other from now on, the way that
            is written in operators of torch alone.
    """
    if model.config.num_experts:
        model.set_experts_implementation("eager")
    longest = position_limit(model.config)
    batch, source, target = Dim("batch"), Dim("source", max=longest), Dim("target", max=longest)
    past = Dim("past", min=0, max=longest)
    ids, target_ids = (torch.ones(_BATCH, length, dtype=torch.long) for length in (_SOURCE, _TARGET))
    of_source = {0: batch, 1: source}
    encoder = _export(
        EncoderProgram(model),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": of_source, "attention_mask": of_source},
    )
    number = 2 * model.config.decoder_layers
    decoder = _export(
        DecoderProgram(model),
        {
            "decoder_input_ids": target_ids,
            "attention_mask": torch.ones_like(ids),
            "self_cache": [cache_tensor(model, _BATCH, _PAST) for _ in range(number)],
            "cross_cache": [cache_tensor(model, _BATCH, _SOURCE) for _ in range(number)],
        },
        {
            "decoder_input_ids": {0: batch, 1: target},
            "attention_mask": of_source,
            "self_cache": [{0: batch, 2: past}] * number,
            "cross_cache": [{0: batch, 2: source}] * number,
        },
    )
    return {"encoder": encoder, "decoder": decoder}


def cache_tensor(model: SparseqForConditionalGeneration, batch: int, length: int) -> torch.Tensor:
    """Keys or values `(B, K, L, D)` of a decoder layer, all zeros."""
    heads = model.config.decoder_num_key_value_heads
    # The configuration fills it in.
    assert heads is not None
    return torch.zeros(batch, heads, length, head_dim(model.config), dtype=model.dtype)


def head_dim(config: SparseqConfig) -> int:
    """The width of the decoder's heads."""
    return config.d_model // config.decoder_attention_heads


@torch.no_grad()
def _export(module: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any]) -> ExportedProgram:
    return torch.export.export(module.eval(), (), kwargs=inputs, dynamic_shapes=shapes)
