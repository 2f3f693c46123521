"""Every form of a saved model loads with the package and without it, bit for bit alike, and can be saved again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from sparseq import SparseqForConditionalGeneration, SparseqInt8Config, SparseqTokenizer
from sparseq.hub.folder import write_hub_folder
from sparseq.modeling_sparseq import CODE_FILES
from tests.hub.client import observe
from tests.hub.conftest import TEXTS, Client, parts

Outputs = dict[str, torch.Tensor]
SMALL_SHARDS = {"max_shard_size": "20KB"}


def adapted(base: Path) -> Any:
    """An adapter that changes what the model computes, unlike a new one."""
    torch.manual_seed(3)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", **options)).eval()


@pytest.fixture
def forms(
    model: SparseqForConditionalGeneration,
    tokenizer: SparseqTokenizer,
    inputs: dict[str, torch.Tensor],
    tmp_path: Path,
) -> dict[str, tuple[Path, Outputs]]:
    """Folder of each form, and what its model computed before it was saved."""
    places = {name: tmp_path / "forms" / name for name in ("one file", "shards", "adapter", "merged", "int8")}
    write_hub_folder(model, tokenizer, places["one file"])
    model.save_pretrained(places["shards"], **SMALL_SHARDS)
    assert len(list(places["shards"].glob("model-*.safetensors"))) > 2
    outputs = {"one file": observe(model, inputs), "shards": observe(model, inputs)}
    adapter = adapted(places["one file"])
    outputs["adapter"] = observe(adapter, inputs)
    adapter.save_pretrained(places["adapter"])
    merged = adapter.merge_and_unload()
    merged.save_pretrained(places["merged"])
    outputs["merged"] = observe(merged, inputs)
    int8 = AutoModelForSeq2SeqLM.from_pretrained(places["one file"], quantization_config=SparseqInt8Config())
    int8.save_pretrained(places["int8"])
    outputs["int8"] = observe(int8, inputs)
    for name in ("adapter", "int8"):
        assert not torch.equal(outputs[name]["logits"], outputs["one file"]["logits"])
    return {name: (place, outputs[name]) for name, place in places.items()}


def jobs(folders: dict[str, Path], **options: Any) -> list[dict[str, Any]]:
    """To load each form, and to save it again into its folder in `save`, if that is given, in small shards."""
    save = options.pop("save", None)
    again = [{} if save is None else {"save": save / name, "save_options": SMALL_SHARDS} for name in folders]
    classes = ["AutoPeftModelForSeq2SeqLM" if name == "adapter" else "AutoModelForSeq2SeqLM" for name in folders]
    return [
        {"auto_class": auto_class, "folder": folder, **options, **saving}
        for auto_class, folder, saving in zip(classes, folders.values(), again, strict=True)
    ]


def assert_same(results: list[dict[str, Any]], expected: list[Outputs]) -> None:
    assert [result.get("error") for result in results] == [None] * len(expected)
    for result, outputs in zip(results, expected, strict=True):
        found = load_file(result["outputs"])
        assert found.keys() == outputs.keys()
        for name, tensor in outputs.items():
            assert torch.equal(found[name], tensor), f"{name} of {result['outputs']} differ"


def test_every_form_loads_both_ways(
    forms: dict[str, tuple[Path, Outputs]],
    model: SparseqForConditionalGeneration,
    tokenizer: SparseqTokenizer,
    inputs: dict[str, torch.Tensor],
    client: Client,
    tmp_path: Path,
) -> None:
    """Every form, and one of them by every auto class; refused without trust, with it bit for bit the same, also from
    folders of other names after a second save."""
    folders = {name: folder for name, (folder, _) in forms.items()}
    of_parts = parts(model, inputs)
    expected = [outputs for _, outputs in forms.values()] + list(of_parts.values())
    by_class = [{"auto_class": name, "folder": folders["one file"]} for name in of_parts]
    words = {"auto_class": "AutoTokenizer", "folder": folders["one file"], "texts": TEXTS}

    *results, installed = client(*jobs(folders), *by_class, words, package=True)
    assert_same(results, expected)
    # The base model of an adapter is inside of PEFT's.
    ours = [result for result, name in zip(results, [*folders, *of_parts], strict=True) if name != "adapter"]
    assert {result["module"] for result in ours} == {"sparseq.modeling_sparseq"}
    assert installed["class"] == "SparseqTokenizer"

    again = tmp_path / "again"
    trusted = [*jobs(folders, trust=True, save=again), *({**job, "trust": True} for job in by_class)]
    refused = [*jobs(folders), *by_class]
    *results, plain = client(*refused, *trusted, {**words, "save": again / "one file"}, package=False)
    for result in results[: len(refused)]:
        assert list(result) == ["error"]
        assert "trust_remote_code=True" in result["error"]
    assert_same(results[len(refused) :], expected)
    assert [result["class"] for result in results[-len(of_parts) :]] == ["SparseqModel", "SparseqEncoderModel"]
    assert all(result["module"].startswith("transformers_modules.") for result in results[-len(of_parts) :])
    for key, ids in (("ids", tokenizer(TEXTS)), ("label_ids", tokenizer(text_target=TEXTS))):
        assert plain[key] == ids["input_ids"] == installed[key]
    assert plain["texts"] == [text.removeprefix("<2de> ") for text in TEXTS]

    # What was saved where the package is absent, elsewhere now. An adapter goes on naming its base model.
    again.rename(tmp_path / "2nd copy, of another.name")
    again = tmp_path / "2nd copy, of another.name"
    moved = {name: again / name for name in folders}
    for name in ("one file", "shards", "merged", "int8"):
        assert (moved[name] / "model.safetensors.index.json").is_file()
        assert {*CODE_FILES, "generation_config.json"} <= {path.name for path in moved[name].iterdir()}
    assert not (moved["adapter"] / "config.json").exists()
    for name in ("shards", "adapter", "merged", "int8"):
        shutil.rmtree(folders[name])
    words["folder"] = moved["one file"]
    *results, plain = client(*jobs(moved, trust=True), words, package=False)
    assert_same(results, expected[: len(moved)])
    assert plain["ids"] == installed["ids"]
    assert_same(client(*jobs(moved), package=True), expected[: len(moved)])


_LOAD_TOKENIZER = """
import json, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sparseq":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
print(json.dumps(tokenizer(json.loads(sys.argv[2]))["input_ids"]))
"""


def test_the_tokenizer_needs_no_trust_and_asks_for_none(
    model: SparseqForConditionalGeneration, tokenizer: SparseqTokenizer, tmp_path: Path
) -> None:
    """Standard input is open here; where it is closed, as in the other tests, no option is needed."""
    folder = write_hub_folder(model, tokenizer, tmp_path / "model")
    home = tmp_path / "home"
    home.mkdir()
    read, write = os.pipe()
    os.write(write, b"y\n")
    os.close(write)
    process = subprocess.run(
        [sys.executable, "-I", "-c", _LOAD_TOKENIZER, folder, json.dumps(TEXTS)],
        env={**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")},
        stdin=read,
        capture_output=True,
        text=True,
    )
    unread = os.read(read, 10)
    os.close(read)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == tokenizer(TEXTS)["input_ids"]
    assert unread == b"y\n"
    assert not list(home.rglob("*.py")), "the folder's code was copied to be run"
