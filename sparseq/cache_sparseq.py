# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""
The cache that `generate()` makes for a Sparseq model: what was once written in it is not moved again.

Shapes: B sources, N beams of each side by side, R = B * N rows, S source length, L tokens of one step, T target tokens
before it, A key-value heads, D size of one head, H hidden size.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

# What positions add to a model: vectors `(1, L, H)`, or the cosines and sines of rotary ones, `(1, 1, L, D)` each.
Positions = tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]


class TargetLayer(DynamicLayer):
    """
    Keys and values of one layer's self-attention, written into memory that has room for more and doubles when it is
    full. The library's layer grows by concatenation, which copies all of it at each step.
    """

    # Tokens that there is room for at first, and numbers that are copied in less time than it takes to write a few to
    # their place.
    _ROOM = 64
    _COPIED = 1 << 15

    def __init__(self) -> None:
        super().__init__()
        # `(2, B, room, A, D)`
        self._store: Any = None
        # What `keys` is as long as nobody else, such as `crop` or `batch_select_indices`, has put something there.
        self._written: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values `(B, A, L, D)`; returns all there are, `(B, A, T + L, D)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        rows, heads, length, size = key_states.shape
        end = past + length
        if end * rows * heads * size <= self._COPIED:
            keys, values = cast(torch.Tensor, self.keys), cast(torch.Tensor, self.values)
            self.keys = torch.cat([keys, key_states], dim=2) if past else key_states
            self.values = torch.cat([values, value_states], dim=2) if past else value_states
            return self.keys, self.values
        kept = rows if not past else cast(torch.Tensor, self.keys).shape[0]
        if rows != kept:
            raise ValueError(
                f"The cache is one of {kept} rows, but there are tokens of {rows}: go on with as many as it was made "
                "with, or start without a cache"
            )
        if not self._may_write() or end > self._store.shape[2]:
            self._make_room(past, end, key_states)
        self._store[0, :, past:end] = key_states.transpose(1, 2)
        self._store[1, :, past:end] = value_states.transpose(1, 2)
        self.keys, self.values = self._store[:, :, :end].transpose(2, 3).unbind(0)
        self._written = self.keys
        return self.keys, self.values

    def keep(self, tokens: torch.Tensor) -> None:
        """Let go of all tokens but these of each row, `(B, kept)`."""
        keys, values = cast(torch.Tensor, self.keys), cast(torch.Tensor, self.values)
        places = tokens[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys, self.values = keys.gather(2, places), values.gather(2, places)

    def _may_write(self) -> bool:
        """Whether there is memory of our own, with what `keys` and `values` say, that may change."""
        if self._written is None or self.keys is not self._written:
            return False
        # Under autograd always into new memory: the backward pass needs the old one as it was.
        return not torch.is_grad_enabled() and (not self._store.is_inference() or torch.is_inference_mode_enabled())

    def _make_room(self, past: int, end: int, like: torch.Tensor) -> None:
        rows, heads, _, size = like.shape
        store = like.new_empty(2, rows, max(self._ROOM, 2 * end), heads, size)
        if past:
            for index, old in enumerate((self.keys, self.values)):
                store[index, :, :past] = cast(torch.Tensor, old).transpose(1, 2)
        self._store = store


class Step(Protocol):
    """What computes one more token the short way."""

    @property
    def head(self) -> Callable[..., torch.Tensor]:
        """What makes logits of the states, given the model's `lm_head`."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        cache: Any,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
    ) -> torch.Tensor: ...


class SparseqCache(EncoderDecoderCache):
    """
    Keys and values of a decoder, for rows of which each source has N side by side.

    The source's are there once, and serve all rows that decode it. Nor are the target's moved when beams change
    places: those of all beams of a source are kept one after the other, step by step, `(B, A, T * N, D)`, and each
    beam attends to the tokens that it descends from. So a decoder step of R rows is one of N tokens for each of B
    sources, with a mask. Once they are many, those that no beam descends from any more are let go. After a beam search
    these are the beams that were still running, not the hypotheses that it returns: such a cache is of no use to
    continue them.

    Args:
        beams: N, the rows of one source that may change places; 1 keeps each row by itself.
        step: The short way to compute one more token, a `DecoderStep`, if there is one. `generate()` takes it back
            when it ends, because it would not notice new weights.
    """

    # Positions that are computed at a time.
    _POSITIONS = 64
    # Tokens of a source up to which none are let go.
    _MANY = 128

    def __init__(self, beams: int = 1, *, step: Step | None = None) -> None:
        target = DynamicCache()
        target.layer_class_to_replicate = TargetLayer
        super().__init__(target, DynamicCache())
        self.beams = beams
        self.step = step
        # `(B, N, T * N - forgotten)`, 0 for the tokens that a beam descends from, and the lowest number for others.
        self._descent: torch.Tensor | None = None
        # Tokens of each source that were let go, and how many there are when the next are looked for.
        self._forgotten, self._enough = 0, self._MANY
        self._source_mask: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
        self._positions: tuple[int, Positions] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy would keep the step when generate() has ended, and what oneDNN has laid out cannot be copied.
        return {**self.__dict__, "step": None}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return (super().get_seq_length(layer_idx) + self._forgotten) // self.beams

    @property
    def takes_steps(self) -> bool:
        """Whether the next token may be computed the short way; it may not before the source is there."""
        return self.step is not None and bool(self.is_updated.get(0))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i continue row `beam_idx[i]`, `(R,)`, of the same source."""
        if self.beams == 1:
            self.self_attention_cache.reorder_cache(beam_idx)
        elif self._descent is not None:
            self._descent = self._descent.flatten(0, 1).index_select(0, beam_idx).view_as(self._descent)
            if self._descent.shape[-1] >= self._enough:
                self._forget(self._descent)

    def _forget(self, descent: torch.Tensor) -> None:
        """Let go of what no beam descends from, if that is a quarter of the tokens or more."""
        number = descent.shape[-1]
        is_needed = (descent == 0).any(dim=1)
        kept = int(is_needed.sum(dim=1).max())
        if kept <= 0.75 * number:
            # As many of each source, in their order: of some also tokens that nobody needs, which the mask hides.
            tokens = is_needed.byte().argsort(dim=1, descending=True, stable=True)[:, :kept].sort(dim=1).values
            for layer in self.self_attention_cache.layers:
                cast(TargetLayer, layer).keep(tokens)
            self._descent = descent.gather(2, tokens[:, None].expand(-1, self.beams, -1))
            self._forgotten += number - kept
            number = kept
        # So what looking and moving costs is little beside the steps in between.
        self._enough = max(self._MANY, number + number // 2)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._give_each_row_its_source()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._give_each_row_its_source()
        super().batch_repeat_interleave(repeats)

    def _give_each_row_its_source(self) -> None:
        if self.beams > 1:
            raise ValueError(
                f"In a cache of a search with {self.beams} beams the rows of a source share memory, so none can be "
                "taken out or repeated: start without a cache, or search with more than 16 beams"
            )
        pairs: Any = zip(self.self_attention_cache.layers, self.cross_attention_cache.layers, strict=False)
        for target, source in pairs:
            source.batch_repeat_interleave(target.keys.shape[0] // source.keys.shape[0])

    def crop(self, tokens_to_remove: int) -> None:
        if self._forgotten:
            raise ValueError(
                f"The cache of a search with {self.beams} beams has let go of tokens, so its last steps cannot be "
                "taken back: start without a cache"
            )
        super().crop(tokens_to_remove * self.beams)
        if self._descent is not None and tokens_to_remove:
            self._descent = self._descent[..., : -abs(tokens_to_remove) * self.beams]

    def reset(self) -> None:
        super().reset()
        self._descent = self._source_mask = None
        self._forgotten, self._enough = 0, self._MANY

    def extend(self, sources: int, length: int, like: torch.Tensor) -> torch.Tensor:
        """
        Make place for one more step of `length` tokens a beam.

        Returns:
            The mask of that step, `(B, 1, L * N, (T + L) * N)`, to be added to the scores. Its tokens are ordered by
            time first, then by beam.
        """
        own = like.new_full((self.beams, self.beams), torch.finfo(like.dtype).min).fill_diagonal_(0.0)
        descent = own.repeat(1, length).expand(sources, -1, -1)
        mask = descent
        if length > 1:
            later = torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
            hidden = later.repeat_interleave(self.beams, 0).repeat_interleave(self.beams, 1)
            mask = descent.repeat(1, length, 1).masked_fill(hidden, torch.finfo(like.dtype).min)
        if self._descent is not None:
            mask = torch.cat([self._descent.repeat(1, length, 1), mask], dim=-1)
            descent = mask if length == 1 else torch.cat([self._descent, descent], dim=-1)
        self._descent = descent
        return mask[:, None]

    def source_mask(
        self, attention_mask: torch.Tensor | None, make: Callable[[], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """What `make` makes of the source's padding mask `(B, S)`; made once, since all steps have the same."""
        if self._source_mask is None or self._source_mask[0] is not attention_mask:
            self._source_mask = (attention_mask, make())
        return self._source_mask[1]

    def positions(self, past: int, make: Callable[[int, int], Positions]) -> Positions:
        """What `make(start, end)` makes of position `past`, of which a block is computed at a time."""
        if self._positions is None or not 0 <= past - self._positions[0] < self._POSITIONS:
            self._positions = (past, make(past, past + self._POSITIONS))
        start, (vectors, rotary) = self._positions
        at = slice(past - start, past - start + 1)
        if rotary is not None:
            rotary = (rotary[0][:, :, at], rotary[1][:, :, at])
        return None if vectors is None else vectors[:, at], rotary
