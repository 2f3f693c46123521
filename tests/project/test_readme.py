"""What README.md and the documents show works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from sparseq.cli import COMMANDS
from sparseq.training.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMAND_LINES = [line for language, code in BLOCKS if not language for line in code.splitlines() if line.strip()]
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_compile(code: str) -> None:
    compile(code, "README.md", "exec")


def test_the_first_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(PYTHON[0], {})
    assert "active per token" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("sparseq ")])
def test_commands_and_recipes_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[1] == "--help" or words[1] in COMMANDS
    if words[1] == "train" and not words[2].startswith("-"):
        assert words[2] in list_recipes()


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text("utf-8")):
        if "://" not in target and "{" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
