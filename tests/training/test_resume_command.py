"""`sparseq train`, killed or stopped and given again, leaves the folder of a run that was left alone."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from sparseq.training.checkpoints import complete_checkpoints
from tests.training.resume_runs import Kill, run, sparseq_command
from tests.training.toy import write_corpus

STACKS = ("encoder", "decoder")


def write_recipe(folder: Path) -> Path:
    """A recipe of 8 updates, with its corpus beside it."""
    write_corpus(folder / "corpus")
    sizes = {f"{stack}_{kind}": 1 for stack in STACKS for kind in ("layers", "num_key_value_heads", "sparse_step")}
    sizes |= {f"{stack}_{kind}": n for stack in STACKS for kind, n in (("ffn_dim", 16), ("attention_heads", 2))}
    recipe = {
        "model": {**sizes, "d_model": 16, "num_experts": 4, "dropout": 0.1, "router_balancing": "loss_free"},
        "tokenizer": {"vocab_size": 300},
        "data": {"folder": str(folder / "corpus"), "source": "en", "target": "de", "test": "test", "max_length": 40},
        "training": {
            "max_steps": 8,
            "tokens_per_batch": 128,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 2,
            "learning_rate": 0.01,
            "save_steps": 2,
            "eval_steps": 3,
            "logging_steps": 2,
            "average_checkpoints": 3,
        },
        "decoding": {"num_beams": 1, "max_length": 12},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "toy.yaml"


def command(recipe: Path, output: Path, kill: Kill | None = None) -> tuple[int, str]:
    errors = output.with_name(f"{output.name}.errors")
    status = run(sparseq_command, "train", str(recipe), "--output", str(output), errors=errors, kill=kill)
    return status[0], errors.read_text()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    status, errors = command(recipe, output)
    assert status == 0, errors
    return output


def assert_same_run(output: Path, whole: Path) -> None:
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json", "test.de.translated"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (output, whole))
    assert results.keys() == expected.keys()
    for key in ("scores", "validation_loss", "steps"):
        assert results[key] == expected[key]
    steps = [[entry["step"] for entry in one["log"] if "loss" in entry] for one in (results, expected)]
    assert steps[0] == steps[1] == [2, 4, 6, 8]
    names = [path.name for path in complete_checkpoints(output / "checkpoints")]
    assert names == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_sigterm_ends_the_command_with_143_and_the_same_command_goes_on(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    kill = Kill("sparseq.training.trainer:SparseqTrainer.training_step", call=9, signum=signal.SIGTERM)
    status, errors = command(recipe, tmp_path / "out", kill)
    assert status == 143
    assert "SIGTERM: stopped after step 5 of 8" in errors
    assert "Give the same command again to go on." in errors
    assert not {"results.json", "config.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert complete_checkpoints(tmp_path / "out" / "checkpoints")[-1].name == "checkpoint-5"
    status, errors = command(recipe, tmp_path / "out")
    assert status == 0, errors
    # Step 5 was saved for the interruption alone, and is no part of the mean.
    assert_same_run(tmp_path / "out", whole)


LATE = {
    "averaging": Kill("sparseq.training.fitting:average_checkpoints", after=True),
    "evaluation of the mean": Kill("sparseq.training.trainer:SparseqTrainer.evaluate"),
    "final weights": Kill("transformers:PreTrainedModel.save_pretrained", after=True),
    "all but the names": Kill("sparseq.training.checkpoints:_flush_tree", after=True),
    "between the names": Kill("pathlib:Path.replace", about="_incomplete/model.safetensors"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "between the names" else [pytest.mark.slow]) for name in LATE]
)
def test_a_kill_after_the_training_leaves_nothing_that_looks_complete(
    name: str, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    # The training is done, and what follows it is not.
    output.mkdir()
    for kept in ("checkpoints", "tokenizer"):
        shutil.copytree(whole / kept, output / kept)
    for kept in ("recipe.json", "text.json"):
        shutil.copy(whole / kept, output)
    status, errors = command(recipe, output, LATE[name])
    assert status == -signal.SIGKILL, errors
    assert not {"results.json", "manifest.json", "config.json"} & {path.name for path in output.iterdir()}
    status, errors = command(recipe, output)
    assert status == 0, errors
    assert_same_run(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        Kill("sparseq.training.run:prepare_output"),
        Kill("sparseq.training.output_folder:write_json"),
        Kill("sparseq.training.tokenizer:train_tokenizer", after=True),
        Kill("sparseq.tokenization_sparseq:SparseqTokenizer.save_pretrained", after=True),
        Kill("sparseq.training.checkpoints:publish_checkpoint", call=3),
    ],
    ids=lambda kill: kill.where.partition(":")[2],
)
def test_a_kill_before_or_within_the_training(kill: Kill, recipe: Path, whole: Path, tmp_path: Path) -> None:
    status, errors = command(recipe, tmp_path / "out", kill)
    assert status == -signal.SIGKILL, errors
    status, errors = command(recipe, tmp_path / "out")
    assert status == 0, errors
    assert_same_run(tmp_path / "out", whole)
