"""The allocator is set where it can be, and left alone where the user has set it."""

import sys

import pytest

from sparseq.training import allocator


def _forget_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)


def test_both_thresholds_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_the_environment(monkeypatch)
    calls: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Libc)
    assert allocator.keep_freed_memory()
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
    assert calls == [(-1, 2**30), (-3, 2**30)]


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_user_s_own_setting_is_kept(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    _forget_the_environment(monkeypatch)
    monkeypatch.setenv(variable, "100000")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("mallopt was looked up"))
    assert not allocator.keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_the_environment(monkeypatch)

    def missing(name: str) -> None:
        raise OSError(f"{name} not found")

    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("mallopt was looked up"))
    assert not allocator.keep_freed_memory()
