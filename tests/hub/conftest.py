"""A tiny model and tokenizer, and clients that load folders in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM

import sparseq
from sparseq import SparseqConfig, SparseqEncoderModel, SparseqForConditionalGeneration, SparseqTokenizer
from sparseq.modeling_sparseq import CODE_FILES
from sparseq.training.tokenizer import train_tokenizer
from tests.hub.client import observe
from tests.hub.server import HubServer

# What a folder of a generating model holds that is ready for the Hub.
FOLDER_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    *CODE_FILES,
    "README.md",
}

TEXTS = ["<2de> Two dogs play in the garden.", "<2de> A man", "<2de> A woman is walking near the river. 🙂"]

Client = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def tokenizer() -> SparseqTokenizer:
    return train_tokenizer(TEXTS * 4, vocab_size=330, language_tags=["de"], show_progress=False)


@pytest.fixture(scope="session")
def config(tokenizer: SparseqTokenizer) -> SparseqConfig:
    return SparseqConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_experts=4,
        router_balancing="loss_free",
        max_position_embeddings=64,
    )


@pytest.fixture
def model(config: SparseqConfig) -> SparseqForConditionalGeneration:
    """Made in this process, with a different router bias for each expert: a buffer that must travel too."""
    model = AutoModelForSeq2SeqLM.from_config(SparseqConfig(**config.to_dict()))
    for router in model.routers("encoder") + model.routers("decoder"):
        router.e_score_correction_bias.copy_(torch.rand(4))
    return model.eval()


@pytest.fixture(scope="session")
def inputs(tokenizer: SparseqTokenizer) -> dict[str, torch.Tensor]:
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "decoder_input_ids": torch.tensor([[1, 20, 30], [1, 40, 50], [1, 60, 70]]),
    }


def parts(
    model: SparseqForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Auto class to what the part of the model that it loads computes."""
    encoder = SparseqEncoderModel(model.config)
    encoder.shared = model.model.shared
    encoder.encoder = model.model.encoder
    return {"AutoModel": observe(model.model, inputs), "AutoModelForTextEncoding": observe(encoder, inputs)}


def run_client(
    home: Path,
    inputs: dict[str, torch.Tensor],
    *jobs: dict[str, Any],
    package: bool,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run jobs (see client.py) one after the other in a new process.

    Args:
        home: A new folder: the process's current one, and without `environment` that of its caches.
        package: Whether `sparseq` can be imported, and is.
        environment: The whole environment; without it the process is offline and its caches are empty.
    """
    home.mkdir()
    save_file(inputs, home / "inputs.safetensors")
    task = {
        "without_package": not package,
        "import_package": package,
        "inputs": str(home / "inputs.safetensors"),
        "jobs": jobs,
    }
    (home / "jobs.json").write_text(json.dumps(task, default=str), "utf-8")
    offline = {"HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("client.py")
    process = subprocess.run(
        # Isolated: neither the current folder nor the script's lends it modules.
        [sys.executable, "-I", str(script), str(home / "jobs.json"), str(home / "results.json")],
        cwd=home,
        env={**os.environ, **offline} if environment is None else environment,
        # A question about trust must be an answer of "no", not a wait.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((home / "results.json").read_text("utf-8"))
    assert bool(report["package_modules"]) == package, report["package_modules"]
    results: list[dict[str, Any]] = report["results"]
    return results


def run_commands(hub: HubServer, home: Path, *commands: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Run `sparseq` commands one after the other in a new process that knows the Hub of the tests alone.

    Returns:
        Each command's "status", and what it has printed: "out" and "err".
    """
    home.mkdir()
    lines = [json.dumps({"arguments": command, "environment": {}}, default=str) + "\n" for command in commands]
    process = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("shell.py"))],
        cwd=home,
        env=hub.environment(home / "hf"),
        input="".join(lines),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture
def client(tmp_path: Path, inputs: dict[str, torch.Tensor]) -> Client:
    """`run_client`, offline with an empty cache."""
    number = 0

    def run(*jobs: dict[str, Any], package: bool) -> list[dict[str, Any]]:
        nonlocal number
        number += 1
        return run_client(tmp_path / f"client-{number}", inputs, *jobs, package=package)

    assert Path(sparseq.__file__).is_file(), "the package must be installed, or blocking it would prove nothing"
    return run
