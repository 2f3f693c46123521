"""Accelerate understands the configurations that we ship, and starts training with them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name

from sparseq.data.grammar import generate_corpus, write_corpus
from sparseq.modeling_sparseq import SparseqExperts, SparseqPreTrainedModel, SparseqSparseMLP
from sparseq.resources import resource_path
from tests.distributed.launching import launch_arguments, launch_environment
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in resource_path("recipes/accelerate").glob("*.yaml")}


@pytest.fixture(autouse=True)
def _restored_environment() -> Any:
    # Plugins write into it.
    with mock.patch.dict(os.environ):
        yield


def test_the_promised_configurations_exist() -> None:
    assert RECIPES.keys() == {"ddp", "ddp-cpu-2", "fsdp2", "deepspeed-zero3"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_accelerate_launch_knows_every_key(recipe: str) -> None:
    known = vars(launch_command_parser().parse_args(["train.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        fields = yaml.safe_load(RECIPES[recipe].read_text()).get(section, {})
        assert fields.keys() <= known.keys()
    # Keys outside of these sections are refused by the command itself.
    assert launch_arguments(recipe).num_processes == 2


@pytest.mark.parametrize("recipe", ["ddp", "ddp-cpu-2"])
def test_ddp_is_nothing_else(recipe: str) -> None:
    environment = launch_environment(recipe)
    assert launch_arguments(recipe).multi_gpu, "the command would start one process"
    assert not any("FSDP" in name or "DEEPSPEED" in name for name in environment)
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("bf16" if recipe == "ddp" else "no")


def test_fsdp2_shards_layers() -> None:
    environment = launch_environment("fsdp2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    os.environ.update(environment)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model = tiny_model()
    plugin.set_auto_wrap_policy(model)
    classes = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {cls.__name__ for cls in classes} == set(SparseqPreTrainedModel._no_split_modules)
    layers = [module for module in model.modules() if type(module) in classes]
    assert len(layers) == model.config.encoder_layers + model.config.decoder_layers


@pytest.mark.parametrize("overrides", [{}, {"gated_ffn": False, "expert_bias": True}])
def test_zero3_takes_stacked_experts_for_leaves(overrides: dict[str, Any]) -> None:
    environment = launch_environment("deepspeed-zero3")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    os.environ.update(environment)
    assert DeepSpeedPlugin().zero_stage == 3
    names = environment["ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"].split(",")
    model = tiny_model(**overrides)
    leaves = [get_module_class_from_name(model, name) for name in names]
    assert leaves == [SparseqSparseMLP]
    experts = [name for name, module in model.named_modules() if isinstance(module, SparseqExperts)]
    assert len(experts) == 4
    assert all(type(model.get_submodule(name.rpartition(".")[0])) in leaves for name in experts)


@pytest.mark.slow
def test_two_cpu_processes_train_from_a_recipe(tmp_path: Path) -> None:
    write_corpus(generate_corpus(train_size=200, validation_size=20, test_size=10), tmp_path / "corpus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES["ddp-cpu-2"])]
    data = [f"data.folder={tmp_path / 'corpus'}", "data.source=en", "data.target=de", "data.test=test"]
    sizes = ["model.d_model=32", "tokenizer.vocab_size=400", "training.tokens_per_batch=512"]
    steps = ["training.max_steps=4", "training.warmup_steps=2", "training.save_steps=2", "training.eval_steps=2"]
    rest = ["training.average_checkpoints=2", "decoding.num_beams=1", "decoding.max_length=16"]
    subprocess.run(
        [
            *(sys.executable, *launch, "--main_process_port", str(port), "scripts/train.py", "tiny-sparse"),
            *(*data, *sizes, *steps, *rest, "--output", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=500,
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["steps"], results["scores"]["sentences"]) == (4, 10)
    states = {path.name for path in (tmp_path / "out" / "checkpoints" / "checkpoint-4").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
