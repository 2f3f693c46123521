"""`import sparseq` brings in nothing that only some users need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = {"accelerate", "datasets", "evaluate", "matplotlib", "onnx", "onnxruntime", "peft", "pyarrow", "sacrebleu"}
BASELINE = "from transformers import MarianMTModel"

# One worker runs all of these, so that each process is started once.
pytestmark = pytest.mark.xdist_group("imports")


def run_python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules_after(statement: str, cwd: Path) -> set[str]:
    """The names in `sys.modules` of a fresh process that ran `statement`."""
    return set(json.loads(run_python(f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))", cwd)))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return modules_after(BASELINE, tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return modules_after("import sparseq", tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="module")
def loaded_by_help(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    statement = (
        "import contextlib, io, sparseq.cli\nwith contextlib.redirect_stdout(io.StringIO()):\n    sparseq.cli.main([])"
    )
    return modules_after(statement, tmp_path_factory.mktemp("cwd"))


def test_import_adds_no_optional_package(baseline: set[str], loaded: set[str]) -> None:
    assert {name.partition(".")[0] for name in loaded - baseline} & OPTIONAL == set()


def test_import_loads_only_the_hub_files(loaded: set[str]) -> None:
    ours = {name for name in loaded if name.startswith("sparseq.")}
    assert ours
    strangers = {name for name in ours if not name.endswith("_sparseq")}
    assert not strangers, f"`import sparseq` must not load {strangers}"


def test_import_works_without_the_optional_packages(tmp_path: Path) -> None:
    hidden = "import sys\nsys.modules.update(dict.fromkeys(%r))\n" % sorted(OPTIONAL)  # noqa: UP031
    assert run_python(hidden + "import sparseq\nprint(sparseq.__version__)", tmp_path).strip()


def test_help_adds_the_shell_only(loaded: set[str], loaded_by_help: set[str]) -> None:
    assert {name for name in loaded_by_help - loaded if name.startswith("sparseq")} == {"sparseq.cli"}
