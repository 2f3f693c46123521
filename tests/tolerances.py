"""How close two computations of the same numbers must be, by type; no test chooses its own tolerance."""

from collections.abc import Sequence
from typing import Any

import torch

# Relative and absolute alike: the tests keep their numbers near 1. float32 and float64 allow for sums in another
# order; bfloat16 has 8 bits, so its unit round-off is 2^-8 = 0.004, and a layer rounds several times.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def assert_close(
    actual: torch.Tensor | None, expected: torch.Tensor | None, dtype: torch.dtype, name: str = ""
) -> None:
    """
    Assert that two tensors of one shape are equal up to the tolerance of `dtype`, and finite.

    Args:
        actual, expected: Compared in float64. None, a parameter without a gradient, equals zeros only.
        dtype: The type that the less precise of the two was computed in.
        name: Put before the message of a failure.
    """
    if actual is None or expected is None:
        present = actual if actual is not None else expected
        assert present is None or not present.any(), f"{name}: only one of the two is None, the other not zero"
        return
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda message: f"{name}: {message}",
    )
    assert torch.isfinite(actual).all(), f"{name} has numbers that are not finite"


def assert_rounds_to(actual: torch.Tensor, expected: Sequence[Any], places: int = 4) -> None:
    """Assert that numbers are what was printed with `places` decimal places."""
    # Half a unit of the last place, and what float32 adds to it.
    torch.testing.assert_close(
        actual.detach().double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0.0,
        atol=0.5 * 10.0**-places + 1e-6,
    )
