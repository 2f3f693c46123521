"""Training on a dataset of the Hub, and from a model of the Hub: the same as from local files."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseq.cli import main
from tests.hub.server import HubServer
from tests.training.toy import write_corpus

# Name of a command -> its exit status and what it wrote to standard error.
Outcomes = dict[str, tuple[int, str]]

# What the runs leave behind is looked at by several tests.
pytestmark = pytest.mark.xdist_group("hub-datasets")

RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        **dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 16),
        **dict.fromkeys(["encoder_layers", "decoder_layers"], 1),
        **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
        **dict.fromkeys(["encoder_num_key_value_heads", "decoder_num_key_value_heads"], 1),
        **{"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    },
    "tokenizer": {"vocab_size": 310},
    "data": {"source": "en", "target": "de", "test": "test", "max_length": 40},
    "training": {
        **{"max_steps": 2, "tokens_per_batch": 128, "warmup_steps": 1, "learning_rate": 0.01},
        **{"save_steps": 2, "eval_steps": 0, "average_checkpoints": 1},
    },
    "decoding": {"num_beams": 1, "max_length": 12},
}
# Split of the corpus -> file of the dataset.
SPLITS = {"train": "train.jsonl", "val": "validation.jsonl", "test": "test.jsonl"}


class World:
    """A Hub with the corpus as a private dataset, and with the model that a run on local files made of it."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        write_corpus(folder / "corpus")
        (folder / "toy.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
        files = {SPLITS[split]: self.records(split) for split in SPLITS}
        for name in ("owner/secret", "owner/pairs"):
            hub.create(name, "datasets", private=True)
            self.commit = hub.put(name, files, kind="datasets")
        hub.readers["owner/pairs"] = {"reader"}
        assert main(["train", *self.recipe(f"data.folder={folder / 'corpus'}"), *self.output("local")]) == 0
        hub.create("owner/toy")
        hub.put("owner/toy", {path.name: path.read_bytes() for path in (folder / "local").iterdir() if path.is_file()})

    def records(self, split: str) -> bytes:
        sides = [(self.folder / "corpus" / f"{split}.{side}").read_text().splitlines() for side in ("en", "de")]
        pairs = [{"translation": {"en": source, "de": target}} for source, target in zip(*sides, strict=True)]
        return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()

    def recipe(self, *changes: str) -> list[str]:
        return [str(self.folder / "toy.yaml"), *changes]

    def output(self, name: str) -> list[str]:
        return ["--output", str(self.folder / name)]

    def file(self, run: str, name: str) -> bytes:
        return (self.folder / run / name).read_bytes()

    def run(self, commands: dict[str, list[str]], **environment: str) -> Outcomes:
        """Commands in a process (shell.py) of a user who may read owner/pairs, always with the same caches."""
        lines = [json.dumps({"arguments": arguments, "environment": {}}) for arguments in commands.values()]
        process = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("shell.py"))],
            cwd=self.folder,
            env=self.hub.environment(self.folder / "home", token="hf_reader", **environment),
            input="\n".join(lines),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        # Empty lines are what `tokenizers` writes past Python while it trains.
        results = [json.loads(line) for line in process.stdout.splitlines() if line]
        return {name: (result["status"], result["err"]) for name, result in zip(commands, results, strict=True)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with HubServer(folder / "storage") as hub:
        yield World(hub, folder)


@pytest.fixture(scope="module")
def online(world: World) -> Outcomes:
    commands = {
        "downloaded": ["train", *world.recipe("data.dataset=owner/pairs"), *world.output("downloaded")],
        "streamed": [
            *("train", *world.recipe("data.dataset=owner/pairs", "data.streaming=true")),
            *world.output("streamed"),
        ],
        "fine-tuned": [
            *("train", "finetune", "start.checkpoint=owner/toy", "data.dataset=owner/pairs", "data.source=en"),
            *("data.target=de", "data.max_length=40"),
            *(f"training.{name}={value}" for name, value in RECIPE["training"].items()),
            *world.output("fine-tuned"),
        ],
        "secret": ["train", *world.recipe("data.dataset=owner/secret"), "--dry-run", *world.output("secret")],
        "absent": ["train", *world.recipe("data.dataset=owner/absent"), "--dry-run", *world.output("absent")],
    }
    return world.run(commands)


@pytest.fixture(scope="module")
def offline(world: World, online: object) -> Outcomes:
    commands = {
        "cached": ["train", *world.recipe("data.dataset=owner/pairs"), "--dry-run", *world.output("cached")],
        "never": ["train", *world.recipe("data.dataset=owner/never"), "--dry-run", *world.output("never")],
    }
    return world.run(commands, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("name", ["downloaded", "streamed"])
def test_a_dataset_of_the_hub_trains_what_local_files_train(name: str, world: World, online: Outcomes) -> None:
    assert online[name][0] == 0, online[name][1]
    for file in ("model.safetensors", "tokenizer.json"):
        assert world.file(name, file) == world.file("local", file), file
    # What the model was trained on is written down with its commit.
    data = json.loads(world.file(name, "manifest.json"))["data"]
    assert data["train"]["sha256"] == data["val"]["sha256"] == {"owner/pairs": world.commit}


def test_a_run_starts_from_a_model_of_the_hub(world: World, online: Outcomes) -> None:
    status, errors = online["fine-tuned"]
    assert status == 0, errors
    start = json.loads(world.file("fine-tuned", "manifest.json"))["start"]
    assert start["hub_id"] == "owner/toy"
    assert start["sha256"]["model.safetensors"] == hashlib.sha256(world.file("local", "model.safetensors")).hexdigest()
    assert world.file("fine-tuned", "tokenizer.json") == world.file("local", "tokenizer.json")
    assert world.file("fine-tuned", "model.safetensors") != world.file("local", "model.safetensors")


@pytest.mark.parametrize("name", ["secret", "absent"])
def test_a_dataset_that_may_not_be_read_or_is_not_there(name: str, online: Outcomes) -> None:
    status, errors = online[name]
    assert status == 2
    assert f"owner/{name}" in errors
    assert "Traceback" not in errors


def test_offline_a_cached_dataset_is_read(offline: Outcomes) -> None:
    status, errors = offline["cached"]
    assert status == 0, errors


def test_offline_another_one_is_missing(offline: Outcomes) -> None:
    status, errors = offline["never"]
    assert status == 2
    assert "owner/never" in errors
    assert "offline" in errors.lower()
