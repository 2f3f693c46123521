"""Folders of earlier versions load, and those of later ones say what they need."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

import sparseq
from sparseq import SparseqConfig, SparseqForConditionalGeneration
from sparseq.cli import main
from sparseq.configuration_sparseq import FORMAT_VERSION, SPARSEQ_VERSION
from tests.hub.client import observe as observe_client
from tests.hub.conftest import Client
from tests.hub.make_fixture import FIXTURES, MODELS, make_model, observe
from tests.tolerances import assert_close

FOLDERS = sorted(path.parent for path in FIXTURES.glob("*/*/config.json"))


def named(folder: Path) -> str:
    return str(folder.relative_to(FIXTURES))


def edit(folder: Path, **fields: Any) -> Path:
    """Change fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text("utf-8")) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), "utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(FIXTURES / "v1" / "sparse", tmp_path / "model"))


def test_there_is_a_fixture_of_every_format_and_it_is_small() -> None:
    assert {path.name for path in FIXTURES.iterdir()} == {f"v{number + 1}" for number in range(FORMAT_VERSION)}
    for version in FIXTURES.iterdir():
        assert {path.name for path in version.iterdir()} >= {"sparse", "dense"}
        files = [path for path in version.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        assert sum(path.stat().st_size for path in files) < 40_000


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_a_folder_of_an_earlier_version_loads_and_computes_the_same(folder: Path, tmp_path: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    written = json.loads((folder / "config.json").read_text("utf-8"))
    for place in (folder, tmp_path / "saved again"):
        model, report = AutoModelForSeq2SeqLM.from_pretrained(place, output_loading_info=True)
        assert not any(report.values()), report
        tokenizer = AutoTokenizer.from_pretrained(place)
        found = observe(model, tokenizer)
        assert found["ids"] == expected["ids"]
        assert found["generated"] == expected["generated"]
        assert_close(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), torch.float32)
        versions = {"format_version": FORMAT_VERSION, "sparseq_version": SPARSEQ_VERSION}
        expected_config = written | versions | {"transformers_version": model.config.transformers_version}
        found_config = json.loads(model.config.to_json_string())
        assert {name: found_config.get(name) for name in expected_config} == expected_config
        model.save_pretrained(tmp_path / "saved again")
        tokenizer.save_pretrained(tmp_path / "saved again")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_now_is_of_the_present_format(name: str, tmp_path: Path) -> None:
    """If this fails, what is saved has changed: raise `FORMAT_VERSION`, unless earlier versions read it rightly."""
    fixture = FIXTURES / f"v{FORMAT_VERSION}" / name
    written = json.loads((fixture / "config.json").read_text("utf-8"))
    make_model(name, written["vocab_size"]).save_pretrained(tmp_path)
    now = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert now | {"transformers_version": None} == written | {"transformers_version": None}
    weights = [load_file(place / "model.safetensors") for place in (fixture, tmp_path)]
    shapes = [{key: (tensor.shape, tensor.dtype) for key, tensor in each.items()} for each in weights]
    assert shapes[0] == shapes[1]


def test_the_fixtures_have_every_kind_of_weight() -> None:
    """What no fixture has could change its name unseen."""
    names: set[str] = set()
    for folder in (FIXTURES / f"v{FORMAT_VERSION}").iterdir():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names |= {key.split(".")[-2] + "." + key.split(".")[-1] if "." in key else key for key in file.keys()}  # noqa: SIM118
    more = ["embed_positions.weight", "final_logits_bias", "lm_head.weight", "layernorm_embedding.bias"]
    more += ["experts.gate_up_proj", "experts.down_proj", "up_proj.weight", "q_proj.bias", "up_proj.bias"]
    assert [name for name in more if name not in names] == []


def test_the_version_is_the_package_s() -> None:
    assert sparseq.__version__ == SPARSEQ_VERSION


def test_the_versions_are_saved_and_belong_to_no_object(tmp_path: Path) -> None:
    config = SparseqConfig(num_experts=4)
    versions = {"format_version": FORMAT_VERSION, "sparseq_version": SPARSEQ_VERSION}
    for values in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string())):
        assert {name: values[name] for name in versions} == versions
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert {name: saved[name] for name in versions} == versions
    # Two configurations are equal whoever wrote them.
    edit(tmp_path, sparseq_version="0.0.1")
    loaded = SparseqConfig.from_pretrained(tmp_path)
    loaded.transformers_version, loaded._name_or_path = config.transformers_version, ""
    assert loaded == config == copy.deepcopy(config)
    assert SparseqConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert loaded.sparseq_version == SPARSEQ_VERSION
    for name in versions:
        with pytest.raises(AttributeError, match=name):
            setattr(config, name, 7)
        with pytest.raises(AttributeError, match=name):
            AutoConfig.from_pretrained(tmp_path, **{name: 7})


@pytest.mark.parametrize(
    "nonsense",
    [{"format_version": value} for value in (0, -1, True, "1", 1.0, None, [1])]
    + [{"sparseq_version": value} for value in ("", "new", "1.0", "1.0.0 rm", 1, None, ["0.1.0"])],
    ids=str,
)
def test_nonsense_is_no_version(nonsense: dict[str, Any], folder: Path) -> None:
    (name,) = nonsense
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        SparseqConfig(**nonsense)
    config = json.loads((folder / "config.json").read_text("utf-8")) | nonsense
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        AutoConfig.from_pretrained(folder)


def test_a_folder_from_before_there_were_versions_loads(folder: Path) -> None:
    edit(folder, format_version=None, sparseq_version=None)
    _, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("version", ["0.1.0", "0.1.1", "0.2.0", "1.0.0rc1"])
def test_a_later_version_that_wrote_nothing_new_is_read(version: str, folder: Path) -> None:
    edit(folder, sparseq_version=version)
    assert AutoConfig.from_pretrained(folder).num_experts == 2


def test_fields_of_users_are_none_of_a_later_version(folder: Path) -> None:
    assert AutoConfig.from_pretrained(edit(folder, my_note="mine")).my_note == "mine"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format_version": FORMAT_VERSION + 1}, f"in format {FORMAT_VERSION + 1}"),
        # Known by its format before anything else of it is judged.
        ({"format_version": FORMAT_VERSION + 1, "d_model": "wide"}, f"in format {FORMAT_VERSION + 1}"),
        ({"attention_sinks": True, "latent_dim": 8}, r"fields unknown here \(attention_sinks, latent_dim\)"),
        ({"position_embedding_type": "alibi"}, r"values unknown here .*position_embedding_type.*alibi"),
    ],
    ids=["format", "format and field", "fields", "value"],
)
def test_a_later_version_says_what_it_needs(
    fields: dict[str, Any], reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, sparseq_version="0.7.3", **fields)
    parts = [reason, r"Sparseq 0\.7\.3", f"this is Sparseq {SPARSEQ_VERSION}", "pip install -U sparseq"]
    for load in (AutoConfig, SparseqConfig, AutoModelForSeq2SeqLM, SparseqForConditionalGeneration):
        with pytest.raises(ValueError, match="(?s)" + ".*".join(parts) + ".*trust_remote_code=True") as raised:
            load.from_pretrained(folder)
        # The library does not tell where it reads when asked for one class.
        assert str(folder) in str(raised.value) or not load.__name__.startswith("Auto")
    # The tokenizer is no part of the format.
    assert len(AutoTokenizer.from_pretrained(folder)) == 48

    (tmp_path / "corpus").mkdir()
    for language in ("en", "de"):
        (tmp_path / "corpus" / f"test.{language}").write_text("A man walks.\n", "utf-8")
    command = ["score", str(folder), "--data", str(tmp_path / "corpus"), "--source", "en", "--target", "de"]
    assert main(command) == 2
    assert "pip install -U sparseq" in capsys.readouterr().err


def test_a_later_version_runs_by_the_code_that_it_brings(
    model: SparseqForConditionalGeneration, inputs: dict[str, torch.Tensor], client: Client, tmp_path: Path
) -> None:
    """The way out that the message names: its own code, without the package. And where that code is an older one."""
    folder = tmp_path / "later"
    model.save_pretrained(folder)
    older = (folder / "configuration_sparseq.py").read_text("utf-8")
    edit(folder, format_version=FORMAT_VERSION + 1, sparseq_version="0.7.3", attention_sinks=False)
    later = older
    for line, changed in {
        f'SPARSEQ_VERSION = "{SPARSEQ_VERSION}"': 'SPARSEQ_VERSION = "0.7.3"',
        f"FORMAT_VERSION = {FORMAT_VERSION}": f"FORMAT_VERSION = {FORMAT_VERSION + 1}",
        "    vocab_size: int = 32_000": "    vocab_size: int = 32_000\n    attention_sinks: bool = False",
    }.items():
        assert later.count(f"\n{line}\n") == 1
        later = later.replace(f"\n{line}\n", f"\n{changed}\n")
    (folder / "configuration_sparseq.py").write_text(later, "utf-8")

    job = {"auto_class": "AutoModelForSeq2SeqLM", "folder": folder, "trust": True}
    (result,) = client({**job, "save": tmp_path / "again"}, package=False)
    assert "error" not in result
    found = load_file(result["outputs"])
    for name, tensor in observe_client(model, inputs).items():
        assert torch.equal(found[name], tensor)
    saved = json.loads((tmp_path / "again" / "config.json").read_text("utf-8"))
    assert (saved["format_version"], saved["sparseq_version"]) == (FORMAT_VERSION + 1, "0.7.3")

    (with_package,) = client(job, package=True)
    assert "in a process that does not import sparseq" in with_package["error"]
    (folder / "configuration_sparseq.py").write_text(older, "utf-8")
    (with_older_code,) = client(job, package=False)
    assert "`code_revision`" in with_older_code["error"]
    assert "Sparseq 0.7.3" in with_older_code["error"]
