"""Where mixed precision in bfloat16 pays."""

from typing import Literal

import torch

# On a CPU narrower models spend their time outside of matrix products, and only these are faster in bfloat16. A step
# with AVX-512 BF16, dense or sparse, took 0.6 to 0.7 of float32's time at a width of 512, and at 256 anything between
# 0.65 and 1.2 of it.
_LEAST_WIDTH_ON_CPU = 512


def uses_bf16(choice: bool | Literal["auto"], d_model: int) -> bool:
    """
    Whether to train in bfloat16: as chosen, or with "auto" where the hardware multiplies it faster than float32.

    That is a GPU or another accelerator with bfloat16 of its own, or a CPU with AMX or AVX-512 BF16 instructions and
    a model wide enough to be busy with matrix products.

    Args:
        choice: True, False or "auto".
        d_model: Width of the model.
    """
    if choice != "auto":
        return choice
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        # Others differ too much to guess: Apple's GPUs have bfloat16, but not every operator in it.
        return False
    return d_model >= _LEAST_WIDTH_ON_CPU and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
