"""Timing of several systems side by side: interleaved rounds, medians, ratios to one of them."""

import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def interleave(
    systems: Mapping[str, Callable[[], object]], *, rounds: int, device: str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call of each system, by name: every round calls all of them once, in an order of its own.

    On the CPU it is the process' CPU time over its threads, which other programs on the machine disturb least; on an
    accelerator, wall-clock time between synchronisations.
    """
    names = list(systems)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # What ran before leaves its marks in caches and allocator, so no system shall always follow the same one.
    order = random.Random(0)
    for number in range(-warmup, rounds):
        for name in order.sample(names, len(names)):
            _synchronize(device)
            start = _now(device)
            systems[name]()
            _synchronize(device)
            if number >= 0:
                seconds[name].append(_now(device) - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """For each system the median over rounds of its time over that of `base` in the same round."""
    return {
        name: statistics.median(mine / other for mine, other in zip(times, seconds[base], strict=True))
        for name, times in seconds.items()
    }


def setting(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit and the global settings of torch that all systems share."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    is_cuda = device.startswith("cuda")
    return {
        "commit": done.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _now(device: str) -> float:
    return time.process_time() if device == "cpu" else time.perf_counter()


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
