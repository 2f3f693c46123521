"""What the routers of one stack did, summed over batches cheaply enough to run inside a training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, ...] = get_args(Stack)


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What the router of one sparse layer did.

    Attributes:
        stack: "encoder" or "decoder".
        layer: Index of the layer in its stack.
        tokens: Real tokens that were routed.
        load: Each expert's share of the choices; the shares sum to 1.
        router_entropy: Mean over tokens of the entropy of the router's normalised scores, in nats: 0 for a router that
            is certain, ln E for one that sees no difference.
        mean_top1_probability: Mean over tokens of the largest normalised score.
    """

    stack: Stack
    layer: int
    tokens: int
    load: tuple[float, ...]
    router_entropy: float
    mean_top1_probability: float

    @property
    def max_violation(self) -> float:
        """MaxVio of arXiv 2408.15664, eq. 4, (max load - mean load) / mean load: 0 is perfect balance."""
        mean = sum(self.load) / len(self.load)
        return (max(self.load) - mean) / mean

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Experts that no token chose."""
        return tuple(expert for expert, share in enumerate(self.load) if share == 0)


def cheap_scores(router: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`router.scores` up to a factor for each token, which `RoutingTotals.add` divides out anyway.

    torch's softmax over a last dimension as short as the number of experts takes about 0.14 microseconds a row on a
    CPU: for a softmax router it would be most of the cost of the totals.

    Args:
        router: A router of a Sparseq model, with `scoring` and `scores`.
    """
    return _softmax_numerators if router.scoring == "softmax" else router.scores


def _softmax_numerators(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.amax(dim=-1, keepdim=True)).exp_()


class RoutingTotals:
    """Sums over the real tokens of many batches, for the sparse layers of one stack.

    `add` takes no boolean index, has no data-dependent shape and never waits for the device. The totals are float64 on
    the device of the logits (float32 on MPS, which has no float64), so that many batches add up exactly enough.

    Args:
        num_layers: Sparse layers of the stack.
        num_experts: E, experts of each of them.
        device: Where the totals lie until the first batch brings them to its own device.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"):
        self.num_layers = num_layers
        self.num_experts = num_experts
        # A row for each layer: choices of each expert (E), tokens, entropy, largest score. One tensor, so that a batch
        # is added by one operation and the ranks of a distributed run by one all_reduce.
        self._totals = torch.zeros(num_layers, num_experts + 3, dtype=_total_dtype(device), device=device)

    @property
    def counts(self) -> torch.Tensor:
        """Choices of each expert, `(layers, E)`: each token makes K of them."""
        return self._totals[:, : self.num_experts]

    @property
    def tokens(self) -> torch.Tensor:
        """Real tokens that each layer routed, `(layers,)`."""
        return self._totals[:, self.num_experts]

    @property
    def entropy(self) -> torch.Tensor:
        """Sum over tokens of the entropy of the normalised scores, in nats, `(layers,)`."""
        return self._totals[:, self.num_experts + 1]

    @property
    def top1(self) -> torch.Tensor:
        """Sum over tokens of the largest normalised score, `(layers,)`."""
        return self._totals[:, self.num_experts + 2]

    @torch.no_grad()
    def add(
        self,
        logits: Sequence[torch.Tensor],
        indices: Sequence[torch.Tensor],
        is_real: torch.Tensor,
        scores: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Add one batch.

        Args:
            logits: Router logits `(N, E)` of each sparse layer.
            indices: Chosen experts `(N, K)` of each; a token with index E is padding and does not count.
            is_real: `(N,)` or `(B, L)` bool, False for further tokens that do not count.
            scores: Maps logits `(layers, N, E)` to scores of the same shape, which are divided by their sum over the
                experts: `router.scores`, or faster on a CPU, `cheap_scores(router)`.

        Raises:
            ValueError: The number of layers or of experts is not the one these totals are for.
        """
        expected = (self.num_layers, self.num_layers, self.num_experts)
        found = (len(logits), len(indices), logits[0].shape[-1] if logits else self.num_experts)
        if found != expected:
            raise ValueError(
                f"These totals are for {expected[0]} sparse layers of {expected[2]} experts, but got logits of "
                f"{found[0]} and indices of {found[1]} layers, with {found[2]} experts."
            )
        if not logits:
            return
        chosen = torch.stack(tuple(indices))
        values = scores(torch.stack(tuple(logits)).float())
        # Sigmoid scores do not sum to 1, and may all underflow.
        tiny = torch.finfo(values.dtype).tiny
        values = values.div_(values.sum(dim=-1, keepdim=True).clamp_(min=tiny))
        weight = (is_real.flatten() & (chosen.amax(dim=-1) < self.num_experts)).float()
        counts = weight.new_zeros(self.num_layers, self.num_experts + 1)
        counts.scatter_add_(1, chosen.flatten(1), weight.repeat_interleave(chosen.shape[-1], dim=1))
        # The clamp is for 0 * log 0.
        entropy = values.clamp(min=tiny).log_().mul_(values).sum(dim=-1).neg_()
        per_token = torch.stack([torch.ones_like(weight), entropy, values.amax(dim=-1)], dim=1)
        # A score that is not finite would get through a product with the weight 0.
        sums = per_token.masked_fill(weight[:, None] == 0, 0.0).sum(dim=-1)
        self._move(sums.device)
        self._totals += torch.cat([counts[:, : self.num_experts], sums], dim=1)

    def sums(self) -> torch.Tensor:
        """All totals as one new vector, `(layers * (E + 3),)`: vectors of several runs or ranks can be added."""
        return self._totals.flatten().clone()

    def load_sums(self, vector: torch.Tensor) -> None:
        """Replace the totals by those of `sums()`, or by a sum of several such vectors.

        Raises:
            ValueError: The vector does not have `layers * (E + 3)` elements.
        """
        if vector.numel() != self._totals.numel():
            raise ValueError(
                f"The totals of {self.num_layers} layers with {self.num_experts} experts are {self._totals.numel()} "
                f"numbers, but the vector has {vector.numel()}."
            )
        self._move(vector.device)
        self._totals.copy_(vector.view_as(self._totals))

    def reset(self) -> None:
        """Set all totals to 0, on the device where they are."""
        self._totals.zero_()

    def layer_loads(self, stack: Stack, layers: Sequence[int]) -> list[LayerLoad]:
        """The means, one entry for each sparse layer; the only method that waits for the device.

        Args:
            stack: The stack these totals are of.
            layers: Indices of its sparse layers, from `config.sparse_layers(stack)`.

        Raises:
            ValueError: No real token was added.
        """
        loads = []
        for layer, (*counts, tokens, entropy, top1) in zip(layers, self._totals.tolist(), strict=True):
            if tokens == 0:
                raise ValueError("The expert load cannot be measured: the batches hold no real token.")
            choices = sum(counts)
            loads.append(
                LayerLoad(
                    stack=stack,
                    layer=layer,
                    tokens=int(tokens),
                    load=tuple(count / choices for count in counts),
                    router_entropy=entropy / tokens,
                    mean_top1_probability=top1 / tokens,
                )
            )
        return loads

    def _move(self, device: torch.device) -> None:
        if self._totals.device != device:
            self._totals = self._totals.to(device=device, dtype=_total_dtype(device))


def _total_dtype(device: torch.device | str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


__all__ = ["STACKS", "LayerLoad", "RoutingTotals", "Stack", "cheap_scores"]
