"""Which tokens each expert takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Distinct (token, layer, expert) triples and repetitions of them that are held before they are merged.
_BUFFER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """A token and one expert of one layer.

    Attributes:
        id: The token.
        token: How it is shown; see `readable_token`.
        count: How often the expert was among the K that the token chose.
        occurrences: How often the token occurred.
        information: count * ln(p(expert | token) / p(expert)), in nats: how much more often than it takes any token
            the expert takes this one, weighted by how often that happened. Summed over all tokens and experts of a
            layer and divided by the number of choices, it is the mutual information of token and expert.
    """

    id: int
    token: str
    count: int
    occurrences: int
    information: float

    @property
    def share(self) -> float:
        """Share of the token's occurrences that the expert took."""
        return self.count / self.occurrences


@dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """The tokens that one expert of one layer takes most, in two orders.

    Attributes:
        by_count: Those it took most often, which are mostly tokens that are frequent everywhere.
        by_information: Those it took most more often than other experts did (`TokenShare.information` above 0), among
            the tokens with a minimal number of occurrences.
    """

    by_count: tuple[TokenShare, ...]
    by_information: tuple[TokenShare, ...]


class TokenTotals:
    """How often each expert of each sparse layer of one stack took each token, summed over batches.

    Only combinations that occur are held, so that a vocabulary of 250,000 tokens and many experts are no burden.

    Args:
        num_layers: Sparse layers of the stack.
        num_experts: E, experts of each of them.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._keys = torch.empty(0, dtype=torch.long)
        self._counts = torch.empty(0, dtype=torch.long)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pending_size = 0

    def add(self, ids: torch.Tensor, indices: Sequence[torch.Tensor], is_real: torch.Tensor) -> None:
        """Add one batch.

        Args:
            ids: Tokens `(B, L)`.
            indices: Chosen experts `(B * L, K)` of each sparse layer; a token with index E is padding.
            is_real: `(B, L)`, False for further tokens that do not count.
        """
        chosen = torch.stack(tuple(indices), dim=1).cpu()
        tokens, real = ids.flatten().cpu(), is_real.flatten().cpu()
        counted = real & (chosen < self.num_experts).all(dim=-1).all(dim=-1)
        layers = torch.arange(self.num_layers)[:, None]
        # A mixed-radix number of token, layer and expert, (N, layers, K).
        keys = (tokens[:, None, None] * self.num_layers + layers) * self.num_experts + chosen
        self._append(*keys[counted].flatten().unique(return_counts=True))

    def merge(self, other: "TokenTotals") -> None:
        """Add all that `other` holds."""
        other._compact()
        self._append(other._keys, other._counts)

    def layer(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The sparse layer at `place`: token ids `(U,)`, ascending, and how often each expert took each, `(U, E)`."""
        self._compact()
        pairs, experts = self._keys // self.num_experts, self._keys % self.num_experts
        here = pairs % self.num_layers == place
        tokens, rows = (pairs[here] // self.num_layers).unique(return_inverse=True)
        counts = torch.zeros(len(tokens), self.num_experts, dtype=torch.long)
        counts[rows, experts[here]] = self._counts[here]
        return tokens.numpy(), counts.numpy()

    def _append(self, keys: torch.Tensor, counts: torch.Tensor) -> None:
        self._pending.append((keys, counts))
        self._pending_size += len(keys)
        if self._pending_size > _BUFFER:
            self._compact()

    def _compact(self) -> None:
        keys = torch.cat([self._keys, *(keys for keys, _ in self._pending)])
        counts = torch.cat([self._counts, *(counts for _, counts in self._pending)])
        self._keys, rows = keys.unique(return_inverse=True)
        self._counts = torch.zeros(len(self._keys), dtype=torch.long).index_add_(0, rows, counts)
        self._pending, self._pending_size = [], 0


def top_tokens(
    totals: TokenTotals,
    place: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    top_k: int,
    limit: int = 10,
    min_occurrences: int = 5,
) -> tuple[ExpertTokens, ...]:
    """The tokens that each expert of a layer takes most.

    Args:
        totals: Counts of the stack.
        place: Which of its sparse layers, counted from 0.
        tokenizer: Names the tokens.
        top_k: K, experts that each token chooses.
        limit: Tokens for each expert and order.
        min_occurrences: Rarer tokens are not ranked by information: of a token that occurs once some expert takes all.

    Returns:
        One entry for each expert. Ties are broken by token id, so that the result depends on the counts alone.
    """
    ids, counts = totals.layer(place)
    occurrences = counts.sum(axis=1) // top_k
    # p(expert | token) over p(expert), both as shares of choices. An expert without a choice has no count to weigh.
    of_token = counts / counts.sum(axis=1, keepdims=True)
    of_all = counts.sum(axis=0) / max(counts.sum(), 1)
    ratio = np.divide(of_token, of_all, out=np.ones_like(of_token), where=counts > 0)
    information = counts * np.log(ratio, where=counts > 0, out=np.zeros_like(ratio))

    def describe(expert: int, rows: np.ndarray) -> tuple[TokenShare, ...]:
        return tuple(
            TokenShare(
                id=int(ids[row]),
                token=readable_token(tokenizer, int(ids[row])),
                count=int(counts[row, expert]),
                occurrences=int(occurrences[row]),
                information=float(information[row, expert]),
            )
            for row in rows
        )

    result = []
    for expert in range(counts.shape[1]):
        count, gain = counts[:, expert], information[:, expert]
        most = np.argsort(-count, kind="stable")[:limit]
        telling = np.argsort(-gain, kind="stable")
        is_telling = (gain[telling] > 0) & (occurrences[telling] >= min_occurrences)
        result.append(
            ExpertTokens(
                by_count=describe(expert, most[count[most] > 0]),
                by_information=describe(expert, telling[is_telling][:limit]),
            )
        )
    return tuple(result)


def readable_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as one word: blanks as "▁", the alphabet of byte-level tokenizers as text, and what cannot be printed
    as an escape such as `\\n` or `\\xe2`."""
    # None where the embedding has more rows than the tokenizer has tokens.
    token: Any = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return f"#{token_id}"
    is_added = token_id in tokenizer.added_tokens_decoder
    if not is_added and _is_byte_level(tokenizer) and all(char in _BYTES for char in token):
        token = bytes(_BYTES[char] for char in token).decode("utf-8", errors="backslashreplace")
    return "".join(
        "▁" if char == " " else char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in token
    )


_BYTES: dict[str, int] = {char: byte for byte, char in bytes_to_unicode().items()}


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in repr(getattr(backend, "decoder", None))


__all__ = ["ExpertTokens", "TokenShare", "TokenTotals", "readable_token", "top_tokens"]
