"""glibc's allocator, set so that training on a CPU keeps its memory."""

import ctypes
import os
import sys

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 30


def keep_freed_memory() -> bool:
    """Stop glibc from returning every large block to the kernel, which then hands it out again page by page.

    Activations of a training step are freed and allocated anew at every step; with the default thresholds each of
    these large blocks is mapped, zeroed and unmapped every time. Does nothing where `MALLOC_TRIM_THRESHOLD_` or
    `MALLOC_MMAP_THRESHOLD_` are set, on other systems, and with other allocators.

    Returns:
        Whether the thresholds were set.
    """
    if sys.platform != "linux" or any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)) and bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
