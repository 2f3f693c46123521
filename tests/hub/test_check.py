"""A folder is judged by reading it: every defect that is planted in a good one is named, and no code of it runs."""

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForTextEncoding

from sparseq import SparseqConfig, SparseqForConditionalGeneration, SparseqTokenizer
from sparseq.hub import alone
from sparseq.hub.alone import load_alone
from sparseq.hub.check import FolderCheck, check_for_upload, describe_contents
from sparseq.hub.contents import LARGEST, format_size
from sparseq.hub.folder import write_hub_folder
from sparseq.hub.upload import check_loads
from sparseq.modeling_sparseq import CODE_FILES
from sparseq.training.lora import lora_config
from tests.hub.conftest import FOLDER_FILES

ADAPTER_CARD = "---\nlibrary_name: peft\ntags:\n- lora\nbase_model: someone/base\n---\n# An adapter\n"
SHARED = "model.shared.weight"
# Never a real one: assembled, so that no file of the repository looks as if it held one.
TOKEN = "hf_" + 17 * "aB"


@pytest.fixture(scope="module")
def good(config: SparseqConfig, tokenizer: SparseqTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = SparseqForConditionalGeneration(SparseqConfig(**config.to_dict()))
    return write_hub_folder(model, tokenizer, tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def good_shards(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "shards"
    shutil.copytree(good, folder)
    (folder / "model.safetensors").unlink()
    SparseqForConditionalGeneration.from_pretrained(good).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def good_adapter(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    model = SparseqForConditionalGeneration.from_pretrained(good)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder))
    edit(folder, "adapter_config.json", base_model_name_or_path="someone/base")
    (folder / "README.md").write_text(ADAPTER_CARD, "utf-8")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def shards(good_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good_shards, tmp_path / "shards")


@pytest.fixture
def adapter(good_adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good_adapter, tmp_path / "adapter")


def edit(folder: Path, name: str, /, **changes: Any) -> None:
    """Change a JSON file; None removes a key."""
    content = {**json.loads((folder / name).read_text("utf-8")), **changes}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_auto_map(folder: Path, **changes: str | None) -> None:
    mapping = {**json.loads((folder / "config.json").read_text("utf-8"))["auto_map"], **changes}
    edit(folder, "config.json", auto_map={key: value for key, value in mapping.items() if value is not None})


def append(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(path.read_text("utf-8") + text, "utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_eval_results(folder: Path, text: str) -> None:
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "someone--captions.yaml").write_text(text, "utf-8")


def fates(check: FolderCheck, fate: str) -> set[str]:
    return {entry.path for entry in check.entries if entry.fate == fate}


def test_a_good_folder(good: Path) -> None:
    check = check_for_upload(good)
    assert (check.kind, check.auto_class, check.problems, check.notes) == ("model", "AutoModelForSeq2SeqLM", (), ())
    assert fates(check, "upload") == {entry.path for entry in check.entries} == FOLDER_FILES
    assert check.size == sum((good / name).stat().st_size for name in FOLDER_FILES)
    check.require_ready()


def test_good_shards(shards: Path) -> None:
    check = check_for_upload(shards)
    assert check.problems == ()
    weights = {path.name for path in shards.glob("*.safetensors*")}
    assert len(weights) > 3
    assert fates(check, "upload") == FOLDER_FILES - {"model.safetensors"} | weights


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForTextEncoding])
def test_models_that_do_not_generate(auto_class: Any, good: Path, tokenizer: SparseqTokenizer, tmp_path: Path) -> None:
    folder = write_hub_folder(auto_class.from_pretrained(good), tokenizer, tmp_path / "model")
    check = check_for_upload(folder)
    assert check.problems == ()
    assert check.auto_class == auto_class.__name__
    assert not (folder / "generation_config.json").exists()


def test_a_good_adapter(adapter: Path) -> None:
    check = check_for_upload(adapter)
    assert (check.kind, check.problems, check.base_model) == ("adapter", (), "someone/base")
    assert check.auto_class == "AutoModelForSeq2SeqLM"
    assert fates(check, "upload") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    edit(adapter, "adapter_config.json", auto_mapping={"base_model_class": "SparseqEncoderModel"})
    assert check_for_upload(adapter).auto_class == "AutoModelForTextEncoding"


def test_what_training_leaves_behind_is_left_out(folder: Path) -> None:
    files = [
        *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "scaler.pt"),
        *("trainer_state.json", "saved_files.json", "recipe.json", "results.json", "manifest.json", "text.json"),
        *("test.de.translated", "train.log", "events.out.tfevents.1", ".gitattributes", ".DS_Store"),
        *(
            "checkpoint-5/optimizer.pt",
            "checkpoints/checkpoint-5/model.safetensors",
            "_incomplete/config.json",
            "_push-1/x.json",
        ),
        *("cache/x.arrow", "data/train.en", "tokenizer/tokenizer.json", "merged/config.json", "runs/a/b", ".git/HEAD"),
        ".sparseq/onnx-float32-0/step.onnx",
    ]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04" + 100 * b"x")
    check = check_for_upload(folder)
    assert check.problems == ()
    assert fates(check, "upload") == FOLDER_FILES
    assert fates(check, "leave out") == {name.partition("/")[0] for name in files}
    assert {entry.size for entry in check.entries if entry.path in ("training_args.bin", "runs")} == {102}
    table = "\n".join(describe_contents(check))
    for entry in check.entries:
        assert entry.path in table
        assert entry.reason in table


def test_what_else_is_uploaded(folder: Path) -> None:
    append(folder, "README.md", "\n![Load](load.png)\n")
    edit_eval_results(folder, "- dataset: {id: someone/captions, task_id: default}\n  value: 29.5\n")
    added = {"load.png", "LICENSE", "CITATION.cff", "chat_template.jinja"}
    for name in added:
        (folder / name).write_bytes(b"x")
    added.add(".eval_results/someone--captions.yaml")
    check = check_for_upload(folder)
    assert check.problems == ()
    assert fates(check, "upload") == FOLDER_FILES | added


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        *(
            (f"weights{suffix}", b"x", "a pickle")
            for suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy", ".PT")
        ),
        ("pytorch_model.bin", b"x", "a pickle"),
        ("adapter_model.safetensors.old", b"x", "no model needs"),
        ("other.safetensors", b"x", "weights that nothing loads"),
        ("model.onnx", b"x", "weights that nothing loads"),
        ("train.py", b"x = 1", "code that the model does not import"),
        ("notes.txt", b"x", "no model needs"),
        ("plot.png", b"x", "README.md does not show"),
        (".env", b"x", "secret"),
        ("id_rsa", b"x", "secret"),
        ("token", b"x", "secret"),
        ("server.PEM", b"x", "secret"),
        ("LICENSE", f"my token is {TOKEN}".encode(), "access token"),
        ("LICENSE", b"-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
        ("vocab.txt", b"\x80\x04\x95pickled", "under another name"),
        ("tokenizer.model", b"PK\x03\x04archive/data.pkl", "under another name"),
        ("..\\LICENSE", b"x", "leads elsewhere"),
        ("C:LICENSE", b"x", "leads elsewhere"),
        ("LICENSE\n", b"x", "leads elsewhere"),
        ("custom_generate/generate.py", b"x", "a folder that no model needs"),
        (".eval_results/run.sh", b"x", "not YAML"),
    ],
)
def test_what_nobody_expects_is_refused(name: str, content: bytes, reason: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    (problem,) = check_for_upload(folder).problems
    assert reason in problem
    assert repr(name)[1:-1] in problem or name.partition("/")[0] in problem


def test_large_files_other_than_weights_are_refused_unread(folder: Path) -> None:
    for name in ("LICENSE", "README.md"):
        # Sparse: no blocks on the disk, and too much to be read into memory by accident.
        os.truncate(folder / name, 10 * LARGEST) if name == "README.md" else (folder / name).touch()
    check = check_for_upload(folder)
    (problem,) = check.problems
    assert problem.startswith("README.md: 1.0 GB, and this file should not have more than 105 MB")


def test_links(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "weights"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)
    (folder / "LICENSE").symlink_to(tmp_path / "absent")
    (folder / "LICENSE.txt").symlink_to("README.md")
    os.mkfifo(folder / "LICENSE.pipe")
    problems = check_for_upload(folder).problems
    assert len(problems) == 3
    for start in (
        f"LICENSE: a link to {tmp_path / 'absent'}",
        "LICENSE.pipe: not a plain",
        "model.safetensors: a link",
    ):
        assert sum(problem.startswith(start) for problem in problems) == 1


DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config cut short": (lambda f: os.truncate(f / "config.json", 100), "config.json cannot be read"),
    "config no object": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json must hold a JSON object, but holds a list",
    ),
    "deep JSON": (lambda f: (f / "config.json").write_text(200_000 * "["), "config.json cannot be read"),
    "another model": (lambda f: edit(f, "config.json", model_type="marian"), "'marian', not 'sparseq'"),
    "no auto_map": (lambda f: edit(f, "config.json", auto_map=None), "has no `auto_map`"),
    "no auto class": (lambda f: edit_auto_map(f, AutoModelForTextEncoding=None), "has no AutoModelForTextEncoding"),
    "code of another repository": (
        lambda f: edit_auto_map(f, AutoModel="someone/evil--modeling_sparseq.SparseqModel"),
        "names no class in a file of this folder",
    ),
    "code outside": (
        lambda f: edit_auto_map(f, AutoModel="../modeling_sparseq.SparseqModel"),
        "'../modeling_sparseq.SparseqModel' for AutoModel",
    ),
    "class not there": (
        lambda f: edit_auto_map(f, AutoModel="modeling_sparseq.Sparse"),
        "modeling_sparseq.py has no class Sparse,",
    ),
    "no architectures": (lambda f: edit(f, "config.json", architectures=None), "no `architectures`"),
    "other architectures": (lambda f: edit(f, "config.json", architectures=["Other"]), "loads 'Other'"),
    "code missing": (lambda f: (f / "configuration_sparseq.py").unlink(), "configuration_sparseq.py is missing"),
    "imported file missing": (
        lambda f: append(f, "configuration_sparseq.py", "\nfrom .helpers import x\n"),
        "helpers.py is missing",
    ),
    "code cut short": (
        lambda f: (f / "modeling_sparseq.py").write_text("class SparseqModel(\n"),
        "modeling_sparseq.py is not Python",
    ),
    "code needs us": (
        lambda f: append(f, "modeling_sparseq.py", "\ndef late():\n    from sparseq.training import run\n"),
        "modeling_sparseq.py imports sparseq",
    ),
    "import that is not copied": (
        lambda f: append(f, "modeling_sparseq.py", "\nfrom . import configuration_sparseq\n"),
        "modeling_sparseq.py has `from . import`",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "old index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json: weights of another save",
    ),
    "shards of another save": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-00001-of-00001.safetensors"),
        "model-00001-of-00001.safetensors: weights of another save",
    ),
    "weights of other shapes": (
        lambda f: edit_weights(f, lambda w: w.update({SHARED: w[SHARED][:, :8].contiguous()})),
        "does not fit the config.json beside it: model.shared.weight is (330, 8), but must be (330, 32)",
    ),
    "shapes of another model": (
        lambda f: edit(f, "config.json", d_model=64),
        "does not fit the config.json beside it",
    ),
    "a weight missing": (
        lambda f: edit_weights(f, lambda w: w.pop(SHARED)),
        f"do not fill the model: {SHARED}",
    ),
    "a weight too many": (
        lambda f: edit_weights(f, lambda w: w.update(stranger=torch.zeros(1))),
        "do not fit its config.json: it has no place for stranger",
    ),
    "sizes at odds": (lambda f: edit(f, "config.json", encoder_attention_heads=3), "encoder_attention_heads"),
    "more layers than weights": (lambda f: edit(f, "config.json", encoder_layers=10_000), "asks for 10002 layers"),
    "pickled weights alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has its weights in pytorch_model.bin: pickles",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing: save the tokenizer"),
    "tokenizer cut short": (lambda f: os.truncate(f / "tokenizer.json", 1000), "tokenizer.json cannot be read"),
    "no tokenizer_config": (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    "tokenizer with code": (
        lambda f: edit(f, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_sparseq.T"]}),
        "would not load without trust",
    ),
    "tokenizer of another model": (lambda f: edit(f, "config.json", vocab_size=40), "`vocab_size` is 40"),
    "no generation_config": (lambda f: (f / "generation_config.json").unlink(), "generation_config.json is missing"),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md, the model card, is missing"),
    "card without metadata": (lambda f: (f / "README.md").write_text("# Mine\n"), "README.md: The model card has no"),
    "card with bad YAML": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "README.md: "),
    "card of another form": (
        lambda f: (f / "README.md").write_text("---\nmodel-index: [x]\nlibrary_name: x\ntags: [x]\n---\n"),
        "README.md: The model card is not valid: `model-index` is no list",
    ),
    "evaluation results of another form": (
        lambda f: edit_eval_results(f, "- dataset: 3"),
        ".eval_results/someone--captions.yaml: The evaluation results are not valid: entry 0 has no `dataset`",
    ),
    "card not UTF-8": (lambda f: (f / "README.md").write_bytes(b"---\n\xff\n---\n"), "README.md: "),
    "adapter in the same folder": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "config.json and adapter_config.json are both there",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_a_model(name: str, folder: Path) -> None:
    plant, message = DEFECTS[name]
    plant(folder)
    check = check_for_upload(folder)
    assert any(message in problem for problem in check.problems), check.problems
    with pytest.raises(ValueError, match="is not ready for the Hub"):
        check.require_ready()


@pytest.mark.parametrize("keep", [0, 7, 8, 200, -2000, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_cut_short_at_any_place(keep: int, sharded: bool, folder: Path, shards: Path) -> None:
    path = sorted((shards if sharded else folder).glob("*.safetensors"))[0]
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    (problem,) = check_for_upload(path.parent).problems
    assert problem.startswith(f"{path} cannot be read")


def test_weights_with_something_behind_them(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    (problem,) = check_for_upload(folder).problems
    assert problem.startswith(f"{folder / 'model.safetensors'} cannot be read")


def edit_weight_map(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    change(weight_map)
    edit(folder, "model.safetensors.index.json", weight_map=weight_map)


SHARD_DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: next(f.glob("model-00002-*")).unlink(), "which model.safetensors.index.json names"),
    "index missing": (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
    "index empty": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no `weight_map`"),
    "shard of another save": (
        lambda f: shutil.copy(next(f.glob("model-00002-*")), f / "model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors: weights of another save",
    ),
    "shard outside": (
        lambda f: edit_weight_map(f, lambda m: m.update({"model.shared.weight": "../../other.safetensors"})),
        "names '../../other.safetensors', which is no safetensors file of its folder",
    ),
    "tensor that no shard has": (
        lambda f: edit_weight_map(f, lambda m: m.update({"extra": next(iter(m.values()))})),
        "do not agree on extra",
    ),
    "tensor that the index forgets": (
        lambda f: edit_weight_map(f, lambda m: m.pop(min(m))),
        "do not agree on model.decoder.",
    ),
}


@pytest.mark.parametrize("name", SHARD_DEFECTS)
def test_defects_of_shards(name: str, shards: Path) -> None:
    plant, message = SHARD_DEFECTS[name]
    plant(shards)
    problems = check_for_upload(shards).problems
    assert any(message in problem for problem in problems), problems


ADAPTER_DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no base": (lambda f: edit(f, "adapter_config.json", base_model_name_or_path=None), "does not say `base_model"),
    "base in a folder": (
        lambda f: edit(f, "adapter_config.json", base_model_name_or_path=str(f)),
        "is a folder of this machine",
    ),
    "no kind": (lambda f: edit(f, "adapter_config.json", peft_type=None), "does not say `peft_type`"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "weights cut short": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 500),
        "adapter_model.safetensors cannot be read",
    ),
    "weights of a model": (
        lambda f: shutil.copy(f / "adapter_model.safetensors", f / "model.safetensors"),
        "model.safetensors: weights of another save",
    ),
    "revision no name": (lambda f: edit(f, "adapter_config.json", revision=[1]), "`revision` must be a commit or"),
    "weights as a pickle": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin: a pickle"),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md, the model card, is missing"),
}


@pytest.mark.parametrize("name", ADAPTER_DEFECTS)
def test_defects_of_an_adapter(name: str, adapter: Path) -> None:
    plant, message = ADAPTER_DEFECTS[name]
    plant(adapter)
    (problem,) = check_for_upload(adapter).problems
    assert message in problem


def test_folders_without_a_model(good: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        check_for_upload(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no model$"):
        check_for_upload(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean .*model\?$"):
        check_for_upload(good.parent)


def test_notes_stop_nothing(folder: Path) -> None:
    edit(folder, "generation_config.json", max_length=None)
    append(folder, "modeling_sparseq.py", "\n# edited\n")
    (folder / "README.md").write_text(ADAPTER_CARD + "\n[More Information Needed]\n", "utf-8")
    check = check_for_upload(folder)
    assert check.problems == ()
    starts = [note.partition(" ")[0] for note in check.notes]
    assert starts == ["README.md", "modeling_sparseq.py", "generation_config.json"]


def test_reading_runs_no_code(folder: Path, tmp_path: Path) -> None:
    code = f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
    append(folder, "modeling_sparseq.py", code)
    append(folder, "configuration_sparseq.py", code)
    (folder / "sitecustomize.py").write_text(code)
    assert [problem.partition(":")[0] for problem in check_for_upload(folder).problems] == ["sitecustomize.py"]
    assert not (tmp_path / "ran").exists()


def test_loads_where_the_package_is_absent(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process sees what would be uploaded and no token; importing sparseq fails there."""
    (folder / "training_args.bin").write_bytes(b"x")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    append(
        folder,
        "modeling_sparseq.py",
        "\nimport importlib as _importlib, json as _json, os as _os\n"
        "try:\n    _found = bool(_importlib.import_module('spars' + 'eq'))\n"
        "except ModuleNotFoundError:\n    _found = False\n"
        f"with open({str(tmp_path / 'seen.json')!r}, 'w') as _file:\n"
        "    _json.dump([_found, _os.listdir('model'), _os.environ.get('HF_TOKEN')], _file)\n",
    )
    check = check_for_upload(folder)
    assert check.problems == ()
    check_loads(check)
    found, files, token = json.loads((tmp_path / "seen.json").read_text("utf-8"))
    assert (found, set(files), token) == (False, FOLDER_FILES, None)


def test_what_needs_the_package_does_not_load(folder: Path) -> None:
    """An import that reading cannot see; what the process says comes back in one line."""
    append(folder, "modeling_sparseq.py", "\nimport importlib\nimportlib.import_module('spars' + 'eq.training')\n")
    check = check_for_upload(folder)
    assert check.problems == ()
    with pytest.raises(ValueError, match="does not work where sparseq is not installed: loading the model") as caught:
        check_loads(check)
    assert "No module named 'sparseq" in str(caught.value)
    assert "\n" not in str(caught.value)


def first_failure(folder: Path, **more: Any) -> str | None:
    """What the process would report; run in this one, which has imported everything already."""
    task = {"auto_class": "AutoModelForSeq2SeqLM", "base_model": None, "grows_vocabulary": False}
    return alone._first_failure({**task, "folder": str(folder), **more})


def test_weights_that_do_not_fit_or_are_not_finite(folder: Path) -> None:
    assert first_failure(folder) is None
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    shared = "model.shared.weight"
    kept = {other: tensor for other, tensor in weights.items() if other != name}
    metadata = {"format": "pt"}
    for changed, message in (
        (kept, f"loading the model with trust: missing keys: {name}"),
        ({**weights, "stranger": torch.zeros(1)}, "loading the model with trust: unexpected keys: stranger"),
        ({**weights, name: torch.full_like(weights[name], torch.nan)}, f"{name} has values that are not finite"),
        ({**weights, shared: 3e38 * weights[shared].sign()}, "a forward pass: the result has values that are not"),
    ):
        save_file(changed, folder / "model.safetensors", metadata)
        assert str(first_failure(folder)).startswith(message)


def test_an_adapter_is_loaded_upon_its_base(adapter: Path, good: Path) -> None:
    assert first_failure(adapter, base_model=str(good)) is None
    failure = str(first_failure(adapter, base_model=str(adapter.parent / "absent")))
    assert failure.startswith("loading the base model")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor[:, :3].contiguous() for name, tensor in weights.items()}, adapter / "adapter_model.safetensors"
    )
    assert str(first_failure(adapter, base_model=str(good))).startswith("loading the adapter: ")


def test_the_base_of_an_adapter_keeps_rows_beyond_its_tokenizer(
    config: SparseqConfig, tokenizer: SparseqTokenizer, tmp_path: Path
) -> None:
    size = len(tokenizer) + 8
    model = SparseqForConditionalGeneration(SparseqConfig(**{**config.to_dict(), "vocab_size": size}))
    model.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [size - 1]}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert first_failure(tmp_path / "adapter", base_model=str(tmp_path / "base"), grows_vocabulary=True) is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "ended by signal 9: was there too little memory?"),
        ("echo first >&2; echo 'the last line' >&2; exit 3", "the process failed: the last line"),
        ("exit 3", "the process failed: exit status 3"),
    ],
)
def test_a_process_that_dies(
    script: str, message: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert message in str(load_alone(good, FOLDER_FILES, auto_class="AutoModelForSeq2SeqLM"))


@pytest.mark.parametrize(
    ("kind", "name", "keys"),
    [
        ("model", "config.json", ["auto_map", "architectures", "model_type", "vocab_size"]),
        ("model", "tokenizer.json", ["model", "added_tokens"]),
        ("model", "tokenizer_config.json", ["auto_map"]),
        ("model", "generation_config.json", ["max_length"]),
        ("shards", "model.safetensors.index.json", ["weight_map"]),
        ("adapter", "adapter_config.json", ["base_model_name_or_path", "peft_type", "auto_mapping", "revision"]),
    ],
)
def test_json_of_any_form_is_judged(kind: str, name: str, keys: list[str], request: pytest.FixtureRequest) -> None:
    """Whatever stands where something else is expected, the answer is a report."""
    folder = request.getfixturevalue({"model": "folder"}.get(kind, kind))
    whole = (folder / name).read_text("utf-8")
    for key in keys:
        for value in (3, "x", [[1]], {"a": [1]}):
            edit(folder, name, **{key: value})
            assert isinstance(check_for_upload(folder), FolderCheck)
            (folder / name).write_text(whole, "utf-8")


def test_no_room_for_the_copy(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(
        OSError, match=r"No space left on device\): make room there, or name another folder with TMPDIR"
    ):
        check_loads(check_for_upload(good))


def test_sizes() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 9_949: "9.9 kB", 9_950: "10 kB", 999_499: "999 kB"}
    sizes |= {999_500: "1.0 MB", 12_345_678: "12 MB", 3 * 10**9: "3.0 GB", 5 * 10**15: "5000 TB"}
    assert {size: format_size(size) for size in sizes} == sizes


def test_the_code_of_an_adapter_s_base_model_is_not_run(
    model: SparseqForConditionalGeneration, tmp_path: Path
) -> None:
    """It may be anybody's repository."""
    base, marker = tmp_path / "base", tmp_path / "marker"
    model.save_pretrained(base)
    for name in CODE_FILES:
        (base / name).write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit\n")
    model.name_or_path = str(base)
    adapter = tmp_path / "adapter"
    get_peft_model(model, lora_config(model, "attention", rank=2)).save_pretrained(adapter)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    options = {"auto_class": "AutoModelForSeq2SeqLM", "base_model": str(base)}
    assert load_alone(adapter, files, **options) is None
    assert not marker.exists()
    # Nor is what cannot be fetched passed over.
    options["base_model"] = "someone/absent"
    assert str(load_alone(adapter, files, **options)).startswith("fetching the base model someone/absent: ")
