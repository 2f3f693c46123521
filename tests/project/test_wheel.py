"""The wheel works without the clone: built from the source distribution, installed in a fresh environment, run."""

import hashlib
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sparseq

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

# One worker runs all of these, so that the wheel is built once.
pytestmark = pytest.mark.xdist_group("wheel")


def checked(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def build(source: Path, output: Path, *options: str) -> None:
    checked([sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(output), str(source)], output)


def contents(wheel: Path) -> dict[str, str]:
    """A digest of every file in a wheel but RECORD, which repeats the others."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `make wheel` builds: from the source distribution."""
    output = tmp_path_factory.mktemp("dist")
    build(ROOT, output)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of a fresh environment that has the wheel, outside the clone."""
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    checked([*install, str(wheel)], folder)

    # The dependencies come from this process's environment. A folder named in a .pth file is searched, but its own
    # .pth files are not read, so an editable install of the clone stays out of sight.
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n", "utf-8")

    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    work = folder / "work"
    work.mkdir()

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return checked([str(environment / "bin" / command[0]), *command[1:]], work, inherited)

    return run


def test_source_distribution_and_clone_build_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "--wheel")
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_wheel_holds_the_package_and_its_resources_only(wheel: Path) -> None:
    names = set(contents(wheel))
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "sparseq").rglob("*.py")}
    recipes = {f"sparseq/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes
    expected = code | recipes | {"sparseq/model_card.md", "sparseq/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_package_and_resources_come_from_the_wheel(installed: Run) -> None:
    code = (
        "import json, importlib.metadata, sparseq\n"
        "from sparseq.resources import resource_path\n"
        "card = resource_path('model_card.md').read_text('utf-8')\n"
        "print(json.dumps([sparseq.__file__, importlib.metadata.version('sparseq'), card]))"
    )
    path, version, card = json.loads(installed("python", "-c", code).stdout)
    assert not Path(path).is_relative_to(ROOT)
    assert Path(path).parents[4].name == "environment"
    assert version == sparseq.__version__
    assert card == (ROOT / "model_card.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        pytest.param("sparseq --version", f"sparseq {sparseq.__version__} (", id="version"),
        pytest.param("python -m sparseq --help", "usage: sparseq", id="help"),
        pytest.param("sparseq train --list", "transformer-base-2017", id="recipes"),
        pytest.param(
            "sparseq demo --quick --output demo", "transformers alone, trust_remote_code=True: the same", id="demo"
        ),
    ],
)
def test_command_runs_from_the_wheel(command: str, printed: str, installed: Run) -> None:
    assert printed in installed(*command.split()).stdout


def test_a_recipe_by_name_trains_from_the_wheel(installed: Run) -> None:
    changes = "data.generated_pairs=300 data.source=en data.target=de tokenizer.vocab_size=700 decoding.max_length=20"
    changes += " training.max_steps=2 training.save_steps=1 training.eval_steps=0 decoding.num_beams=1"
    done = installed("sparseq", "train", "tiny-sparse", *changes.split(), "--output", "tiny")
    assert "The model is in tiny." in done.stdout
    code = (
        "import sparseq, torch; from transformers import AutoModelForSeq2SeqLM;"
        "model = AutoModelForSeq2SeqLM.from_pretrained('tiny');"
        "print(model.config.num_experts, model.generate(torch.tensor([[5, 2]]), max_new_tokens=2).shape)"
    )
    assert installed("python", "-c", code).stdout.startswith("8 torch.Size([1, ")
