"""Every file with tests is collected: by `make test` or, where its tests are slow, by `make test-all`.

That the two differ by the slow tests only is shown in test_makefile.py.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What an outer make hands to its recipes would change what the inner make prints.
MAKE_VARIABLES = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "ARGS", "PYTEST_ADDOPTS"}


def environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name not in MAKE_VARIABLES and not name.startswith(("PYTEST_XDIST", "PYTEST_CURRENT"))
    }


def pytest_command(target: str, root: Path) -> str:
    """The shell line by which `make TARGET` runs pytest, to collect only."""
    printed = subprocess.run(
        ["make", "--dry-run", target, f"PY={sys.executable}", "ARGS=--collect-only -q"],
        cwd=root,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (line,) = [line for line in printed.splitlines() if "-m pytest" in line]
    return line


def collected(target: str, root: Path = ROOT) -> set[str]:
    """The ids of the tests that `make TARGET` runs."""
    result = subprocess.run(
        pytest_command(target, root), shell=True, cwd=root, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return {line.strip() for line in result.stdout.splitlines() if re.match(r"\S+\.py::", line)}


def files_of(ids: set[str], root: Path = ROOT) -> set[Path]:
    return {root / name.partition("::")[0] for name in ids}


def holds_tests(path: Path) -> bool:
    """Whether a file looks like one with tests, by its name or by what it defines."""
    if re.fullmatch(r"test_.*|.*_test", path.stem):
        return True
    return any(
        (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"))
        or (isinstance(node, ast.ClassDef) and node.name.startswith("Test"))
        for node in ast.parse(path.read_text("utf-8")).body
    )


def test_every_test_file_is_collected() -> None:
    expected = {path for path in (ROOT / "tests").rglob("*.py") if holds_tests(path)}
    assert Path(__file__) in expected
    missed = expected - files_of(collected("test-all"))
    assert not missed, f"`make test-all` does not collect {sorted(map(str, missed))}"


@pytest.mark.parametrize("name", ["model_test.py", "checks.py"])
def test_a_misnamed_test_file_is_noticed(name: str, tmp_path: Path) -> None:
    for copied in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / copied).write_text((ROOT / copied).read_text("utf-8"), "utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_good.py").write_text("def test_good():\n    pass\n", "utf-8")
    misnamed = tmp_path / "tests" / name
    misnamed.write_text("def test_lost():\n    assert False\n", "utf-8")

    assert holds_tests(misnamed)
    assert files_of(collected("test-all", tmp_path), tmp_path) == {tmp_path / "tests" / "test_good.py"} | (
        {misnamed} if name == "model_test.py" else set()
    )
