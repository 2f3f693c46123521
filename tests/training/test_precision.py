import pytest
import torch

from sparseq.training.precision import uses_bf16


def _hardware(
    patch: pytest.MonkeyPatch, *, cuda: bool = False, cuda_bf16: bool = False, cpu_bf16: bool = False
) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: cuda)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16)
    patch.setattr(torch.accelerator, "is_available", lambda: cuda)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_what_is_chosen_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16 in (False, True):
        _hardware(monkeypatch, cpu_bf16=has_bf16)
        assert uses_bf16(True, 64)
        assert not uses_bf16(False, 1024)


@pytest.mark.parametrize(
    ("hardware", "width", "expected"),
    [
        ({}, 1024, False),
        ({"cpu_bf16": True}, 512, True),
        ({"cpu_bf16": True}, 256, False),
        ({"cuda": True, "cuda_bf16": True}, 64, True),
        # A card without it does not fall back on what its host can do.
        ({"cuda": True, "cpu_bf16": True}, 1024, False),
    ],
)
def test_automatic_choice(
    monkeypatch: pytest.MonkeyPatch, hardware: dict[str, bool], width: int, expected: bool
) -> None:
    _hardware(monkeypatch, **hardware)
    assert uses_bf16("auto", width) is expected
