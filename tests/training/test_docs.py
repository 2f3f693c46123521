"""The code in docs/training.md runs as it stands there, one block after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_document_s_code_trains_and_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DOCUMENT.read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    *_, evaluation = names["trainer"].state.log_history
    assert float(capsys.readouterr().out.split()[-1]) == evaluation["eval_router/max_vio"]
    logs = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    # Sparse are layers 1 of both stacks; the table's examples are real keys.
    table = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`([^`]*)`", row) if not name.startswith(".")}
    assert len(named) == 12
    assert named - logs[-1].keys() == {"router/encoder_1/min_load"}
