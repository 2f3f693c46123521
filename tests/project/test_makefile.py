"""What the Makefile does before anything is installed, tried with a stand-in for Python that only keeps a log."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["help", "demo", "test", "test-all", "lint", "format", "bench", "wheel", "clean"]
VARIABLES = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "PY", "ARGS"}
VARIABLES |= {"DATA", "SRC", "TGT", "TEST", "OUT"}

STAND_IN = """\
#!/bin/sh
# $0 is written to the log with its arguments; the environment says what this Python cannot do.
case "$*" in
  *version_info*) exit ${OLD:-0} ;;
  *"import ensurepip"*) exit ${NO_VENV:-0} ;;
  *"import pip"*) exit 0 ;;
  --version) echo "Python 3.9.1"; exit 0 ;;
esac
echo "$*" >> log
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"pip install"*) exit ${NO_NETWORK:-0} ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder, with a blank in its path, that holds what the Makefile reads and the stand-in."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    stand_in = folder / "stand-in"
    stand_in.write_text(STAND_IN, "utf-8")
    stand_in.chmod(0o755)
    return folder


def make(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(["make", *arguments], cwd=clone, env=inherited | environment, capture_output=True, text=True)


def log(clone: Path) -> list[str]:
    path = clone / "log"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def torch_pin() -> str:
    (pin,) = [
        line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("torch==")
    ]
    return pin


def test_help_is_the_default_and_names_every_target(clone: Path) -> None:
    result = make(clone)
    assert result.returncode == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert set(TARGETS) <= set(listed)
    assert log(clone) == []


def test_installs_once_and_torch_first(clone: Path) -> None:
    python = f"PYTHON={clone / 'stand-in'}"
    assert make(clone, "bench", python).returncode == 0
    installation = [
        "-m venv .venv",
        f"-m pip install {torch_pin()}",
        "-m pip install -c constraints.txt -e .[all,dev]",
    ]
    assert log(clone) == [*installation, "benchmarks/import_time.py"]

    assert make(clone, "bench", python).returncode == 0
    assert log(clone) == ["benchmarks/import_time.py"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_the_dependencies_change(clone: Path, name: str) -> None:
    python = f"PYTHON={clone / 'stand-in'}"
    make(clone, "install", python)
    log(clone)
    stamp = (clone / ".venv" / ".installed").stat().st_mtime
    os.utime(clone / name, (stamp + 10, stamp + 10))
    assert make(clone, "install", python).returncode == 0
    assert len(log(clone)) == 2


def test_installs_again_after_the_clone_was_moved(clone: Path) -> None:
    make(clone, "install", f"PYTHON={clone / 'stand-in'}")
    log(clone)
    moved = clone.rename(clone.parent / "moved")
    assert make(moved, "install").returncode == 0
    assert len(log(moved)) == 2


def test_a_failed_installation_is_reported_and_tried_again(clone: Path) -> None:
    python = f"PYTHON={clone / 'stand-in'}"
    result = make(clone, "test", python, NO_NETWORK="1")
    assert result.returncode != 0
    assert "the installation failed" in result.stderr
    assert not any("pytest" in line for line in log(clone))
    assert make(clone, "install", python).returncode == 0
    assert len(log(clone)) == 2


def test_no_python(clone: Path) -> None:
    result = make(clone, "test", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "no Python found as 'no-such-python'" in result.stderr


def test_python_is_too_old(clone: Path) -> None:
    result = make(clone, "test", f"PYTHON={clone / 'stand-in'}", OLD="1")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "is Python 3.9.1" in result.stderr
    assert log(clone) == []


def test_venv_is_missing(clone: Path) -> None:
    result = make(clone, "test", f"PYTHON={clone / 'stand-in'}", NO_VENV="1")
    assert result.returncode != 0
    assert "lacks the modules venv and ensurepip" in result.stderr
    assert not (clone / ".venv").exists()


def test_a_broken_environment_is_reported_even_if_it_is_complete(clone: Path) -> None:
    python = f"PYTHON={clone / 'stand-in'}"
    make(clone, "install", python)
    log(clone)
    interpreter = clone / ".venv" / "bin" / "python"
    interpreter.unlink()
    interpreter.symlink_to(clone / "a-python-that-was-removed")
    result = make(clone, "test", python)
    assert result.returncode != 0
    assert ".venv is broken" in result.stderr
    assert "rm -rf .venv" in result.stderr
    assert log(clone) == []


def test_demo_passes_its_variables(clone: Path) -> None:
    python = f"PYTHON={clone / 'stand-in'}"
    make(clone, "install", python)
    log(clone)
    assert make(clone, "demo").returncode == 0
    assert log(clone) == ["-m sparseq demo"]
    make(clone, "demo", "DATA=my texts", "SRC=en", "TGT=de", "TEST=test_2016_flickr", "OUT=out", "ARGS=--quick")
    assert log(clone) == [
        "-m sparseq demo --data my texts --source en --target de --test test_2016_flickr --output out --quick"
    ]


def test_test_leaves_out_slow_tests_and_test_all_does_not(clone: Path) -> None:
    make(clone, "install", f"PYTHON={clone / 'stand-in'}")
    log(clone)
    make(clone, "test", "test-all")
    assert log(clone) == ["-m pytest -n 2 --dist loadgroup -m not slow", "-m pytest -n 2 --dist loadgroup"]


def test_clean_keeps_the_environment(clone: Path) -> None:
    make(clone, "install", f"PYTHON={clone / 'stand-in'}")
    for folder in ("dist", ".mypy_cache", "tests/__pycache__", "outputs"):
        (clone / folder).mkdir(parents=True)
    assert make(clone, "clean").returncode == 0
    assert not any((clone / gone).exists() for gone in ("dist", ".mypy_cache", "tests/__pycache__"))
    assert (clone / ".venv" / ".installed").exists()
    assert (clone / "outputs").exists()
