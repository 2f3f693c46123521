"""What a model folder holds, and that it is never half written; test_forms.py loads it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, AutoTokenizer

import sparseq
from sparseq import SparseqConfig, SparseqForConditionalGeneration, SparseqModel, SparseqTokenizer
from sparseq.hub.card import CardFacts, DataFacts
from sparseq.hub.folder import write_card, write_hub_folder
from sparseq.modeling_sparseq import CODE_FILES
from tests.hub.client import observe
from tests.hub.conftest import FOLDER_FILES, TEXTS, parts


def test_files_and_configs(
    model: SparseqForConditionalGeneration, tokenizer: SparseqTokenizer, tmp_path: Path
) -> None:
    folder = write_hub_folder(model, tokenizer, tmp_path / "new" / "model")
    assert folder == tmp_path / "new" / "model"
    assert {path.name for path in folder.iterdir()} == FOLDER_FILES
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "something was left beside the folder"

    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sparseq.SparseqConfig",
        "AutoModel": "modeling_sparseq.SparseqModel",
        "AutoModelForSeq2SeqLM": "modeling_sparseq.SparseqForConditionalGeneration",
        "AutoModelForTextEncoding": "modeling_sparseq.SparseqEncoderModel",
    }
    assert config["architectures"] == ["SparseqForConditionalGeneration"]
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for name in CODE_FILES:
        assert (folder / name).read_bytes() == Path(sparseq.__file__).with_name(name).read_bytes()
    assert str(tmp_path) not in "".join(path.read_text("utf-8") for path in folder.glob("*.json"))
    assert "active per token" in ModelCard.load(folder / "README.md").text


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForTextEncoding"])
def test_models_without_a_head(
    auto_class: str,
    model: SparseqForConditionalGeneration,
    tokenizer: SparseqTokenizer,
    inputs: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    """A folder written from a loaded bare model or encoder loads again, and its card speaks of that kind."""
    load = {"AutoModel": AutoModel, "AutoModelForTextEncoding": AutoModelForTextEncoding}[auto_class]
    loaded = load.from_pretrained(write_hub_folder(model, tokenizer, tmp_path / "whole"))
    folder = write_hub_folder(loaded, tokenizer, tmp_path / "part")
    assert {path.name for path in folder.iterdir()} == FOLDER_FILES - {"generation_config.json"}
    again, report = load.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in observe(again, inputs).items():
        assert torch.equal(tensor, parts(model, inputs)[auto_class][name])
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "feature-extraction"
    assert f"import {auto_class}, AutoTokenizer" in card.text
    assert f"| parameters, total | {sum(p.numel() for p in loaded.parameters()):,} |" in card.text


def test_replaces_an_earlier_model_and_nothing_else(
    model: SparseqForConditionalGeneration, tokenizer: SparseqTokenizer, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    (target / "checkpoint-10").mkdir(parents=True)
    (target / "checkpoint-10" / "config.json").write_text("{}", "utf-8")
    (target / "notes.txt").write_text("mine", "utf-8")
    # Whoever trusts the folder would run this in place of the new model's generate().
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text("def generate(model): ...", "utf-8")
    model.save_pretrained(target, max_shard_size="10KB")
    assert (target / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    write_hub_folder(model, tokenizer, target)
    assert {path.name for path in target.iterdir()} == FOLDER_FILES | {"checkpoint-10", "notes.txt"}
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(target)
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)


def test_files_are_the_same_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_as_windows(
        path: Path, text: str, encoding: str, errors: None = None, newline: str | None = None
    ) -> None:
        with path.open("w", encoding=encoding, newline="\r\n" if newline is None else newline) as file:
            file.write(text)

    monkeypatch.setattr(Path, "write_text", write_as_windows)
    (card,) = write_card(tmp_path, SparseqConfig(vocab_size=100), CardFacts())
    assert b"\r" not in card.read_bytes()


class Killed(BaseException):
    """As good as SIGKILL here, once nothing cleans up."""


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_write_leaves_nothing_that_looks_complete(
    exists: bool,
    model: SparseqForConditionalGeneration,
    tokenizer: SparseqTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after each of its steps in turn, a write leaves the old model, nothing that loads, or the new model."""
    target, backup = tmp_path / "model", tmp_path / "backup"
    bigger = SparseqForConditionalGeneration(SparseqConfig(**{**model.config.to_dict(), "encoder_layers": 3}))
    if exists:
        write_hub_folder(model, tokenizer, backup)
    remove = shutil.rmtree
    outcomes: list[str] = []
    while "new" not in outcomes:
        if target.exists():
            remove(target)
        if exists:
            shutil.copytree(backup, target)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            _kill_after(len(outcomes), patch)
            with pytest.raises(Killed):
                write_hub_folder(bigger, tokenizer, target)
        outcomes.append(_what_lies_in(target, backup))
    # Each of them more than once, or the steps were not those that matter.
    assert list(dict.fromkeys(outcomes)) == (["old", "nothing", "new"] if exists else ["nothing", "new"])
    assert len(outcomes) > (10 if exists else 3)


def _kill_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many steps of a write succeed, and end the process after the next."""
    left = [steps]

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return result

        patch.setattr(owner, name, step)

    for owner, name in [(os, "rename"), (os, "replace"), (shutil, "copyfile"), (Path, "unlink"), (Path, "write_text")]:
        count(owner, name)


def _what_lies_in(target: Path, backup: Path) -> str:
    if not (target / "config.json").exists():
        with pytest.raises((OSError, ValueError)):
            AutoModelForSeq2SeqLM.from_pretrained(target)
        return "nothing"
    _, report = AutoModelForSeq2SeqLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    assert {path.name for path in target.iterdir()} == FOLDER_FILES
    if backup.exists() and (target / "config.json").read_bytes() == (backup / "config.json").read_bytes():
        assert (target / "model.safetensors").read_bytes() == (backup / "model.safetensors").read_bytes()
        return "old"
    return "new"


@pytest.mark.parametrize("problem", ["file", "vocabulary", "card", "not ours"])
def test_mistakes_are_found_before_anything_is_written(
    problem: str, model: SparseqForConditionalGeneration, tokenizer: SparseqTokenizer, tmp_path: Path
) -> None:
    target, card, message = tmp_path / "model", CardFacts(), ""
    saved: Any = model
    if problem == "file":
        target.write_text("mine", "utf-8")
        message = "is a file"
    elif problem == "vocabulary":
        saved = SparseqModel(SparseqConfig(**{**model.config.to_dict(), "vocab_size": 100}))
        message = f"has {len(tokenizer)} tokens, but the model's `vocab_size` is 100"
    elif problem == "card":
        card = CardFacts(data=[DataFacts(name="corpus", hub_id="some/where/else")])
        message = "some/where/else"
    else:
        saved = torch.nn.Linear(2, 2)
        message = "got Linear"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        write_hub_folder(saved, tokenizer, target, card=card)
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_of_another_class_is_kept(
    model: SparseqForConditionalGeneration, tokenizer: SparseqTokenizer, tmp_path: Path
) -> None:
    """As with a model whose tokenizer was loaded without the package."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))
    settings["tokenizer_class"] = "TokenizersBackend"
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    plain = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(plain).__name__ == "TokenizersBackend"
    folder = write_hub_folder(model, plain, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
