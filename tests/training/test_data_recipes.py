"""Runs on text from elsewhere than a folder, on several language pairs, and on text with defects."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sparseq.cli import main
from sparseq.data.store import Store
from sparseq.metrics import translation_scores
from sparseq.training.recipes import Recipe, build_recipe, load_recipe
from sparseq.training.run import train
from sparseq.training.sections import DataRecipe
from sparseq.training.text import locate_data, read_splits, sentences

WORDS = ["one", "two", "three", "four", "five", "six"]
SIZES = {"train": 60, "val": 6, "test": 5}

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


def lines(language: str, split: str) -> list[str]:
    """Sentences of a made-up language: the English words, each with the language's ending."""
    rows = [[WORDS[(i * k + i // 7) % 6] for k in range(2, 4 + i % 5)] for i in range(SIZES[split])]
    return [" ".join(w if language == "en" else w + language for w in row) for row in rows]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split in SIZES:
        for language in ("en", "de", "fr"):
            (folder / f"{split}.{language}").write_text("\n".join(lines(language, split)) + "\n")
    return folder


def recipe(**data: Any) -> Recipe:
    heads = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    heads |= dict.fromkeys(["encoder_num_key_value_heads", "decoder_num_key_value_heads"], 1)
    sizes = dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 16)
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    training = {"max_steps": 2, "tokens_per_batch": 128, "warmup_steps": 1, "learning_rate": 0.01, "save_steps": 2}
    return build_recipe(
        "toy",
        {
            "model": {**sizes, **layers, **heads, "num_experts": 0},
            "tokenizer": {"vocab_size": 320},
            "data": {"max_length": 40, **data},
            "training": {**training, "eval_steps": 0, "average_checkpoints": 1},
            "decoding": {"num_beams": 1, "max_length": 12},
        },
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_a_table_trains_the_model_that_files_train(corpus: Path, tmp_path: Path) -> None:
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = [
            {"translation": {"en": a, "de": b}} for a, b in zip(lines("en", split), lines("de", split), strict=True)
        ]
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"{name}.parquet")
    languages = {"source": "en", "target": "de", "test": "test"}
    by_file = train(recipe(folder=str(corpus), **languages), tmp_path / "files", progress=False)
    by_table = train(recipe(dataset=str(tmp_path / "set"), **languages), tmp_path / "table", progress=False)
    expected = load_file(tmp_path / "files" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "table" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert by_table.translations == by_file.translations
    assert by_table.language_pairs == {}
    assert (tmp_path / "table" / "test.de.translated").read_text() == (
        tmp_path / "files" / "test.de.translated"
    ).read_text()


def test_columns_without_languages_have_no_tag(tmp_path: Path) -> None:
    for name, split in (("a", "train"), ("b", "val")):
        rows = {"document": lines("en", split), "summary": [line.split()[0] for line in lines("en", split)]}
        datasets.Dataset.from_dict(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    columns = {"source_column": "document", "target_column": "summary"}
    files = {"train_files": str(tmp_path / "a.csv"), "validation_files": [str(tmp_path / "b.csv")]}
    result = train(recipe(**columns, **files), tmp_path / "out", progress=False)
    assert result.references == [line.split()[0] for line in lines("en", "val")]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").language_tags == []
    assert (tmp_path / "out" / "val.target.translated").is_file()


@pytest.fixture(scope="module")
def several(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "out"
    pairs = recipe(folder=str(corpus), pairs=["en-de", "en-fr", "de-en"], temperature=2, test="test")
    train(pairs, out, progress=False)
    return out


def test_each_language_pair_is_translated_under_its_tag_and_scored(several: Path) -> None:
    results = read_json(several / "results.json")
    tokenizer = AutoTokenizer.from_pretrained(several)
    assert tokenizer.language_tags == ["<2de>", "<2fr>", "<2en>"]
    model = AutoModelForSeq2SeqLM.from_pretrained(several).eval()
    scores = []
    for pair in ("en-de", "en-fr", "de-en"):
        source, target = pair.split("-")
        translations = (several / f"test.{pair}.translated").read_text().splitlines()
        for line, translation in zip(lines(source, "test"), translations, strict=True):
            output = model.generate(**tokenizer([f"<2{target}> {line}"], return_tensors="pt"))
            assert tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip() == translation
        scores.append(translation_scores(translations, lines(target, "test")))
        assert results["language_pairs"][pair]["scores"] == scores[-1]
    assert results["scores"]["chrf"] == pytest.approx(sum(one["chrf"] for one in scores) / 3)
    assert results["scores"]["sentences"] == 15


def test_the_validation_loss_is_that_of_all_pairs_by_tokens(several: Path) -> None:
    results = read_json(several / "results.json")
    tokenizer = AutoTokenizer.from_pretrained(several)
    tokens = {
        pair: sum(len(tokenizer(line)["input_ids"]) for line in lines(pair.split("-")[1], "val"))
        for pair in results["language_pairs"]
    }
    losses = {pair: entry["validation_loss"] for pair, entry in results["language_pairs"].items()}
    mean = sum(losses[pair] * tokens[pair] for pair in tokens) / sum(tokens.values())
    assert results["validation_loss"] == pytest.approx(mean, rel=1e-5)
    assert len(set(losses.values())) == 3


def test_the_manifest_tells_language_pairs_apart(several: Path) -> None:
    data = read_json(several / "manifest.json")["data"]
    assert (data["train"]["pairs"], list(data["train"]["language_pairs"])) == (180, ["en-de", "en-fr", "de-en"])
    assert data["train"]["language_pairs"]["en-fr"]["sha256"].keys() == {"train.en", "train.fr"}


def test_a_second_start_finds_text_and_tokens_on_disk(
    several: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(several, tmp_path / "out")
    written: list[str] = []
    monkeypatch.setattr(Store, "put", lambda self, key, *args: written.append(key))
    # Elsewhere, the same text is the same.
    shutil.copytree(corpus, tmp_path / "moved")
    pairs = recipe(folder=str(tmp_path / "moved"), pairs=["en-de", "en-fr", "de-en"], temperature=2, test="test")
    assert train(pairs, tmp_path / "out", progress=False).steps == 2
    assert written == []
    # 3 splits of text and 2 of tokens, for each of 3 pairs; de-en has the text of en-de the other way round.
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 15


def test_a_run_of_an_earlier_version_continues(several: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(several, tmp_path / "out")
    note = tmp_path / "out" / "recipe.json"
    old = read_json(note)
    for key in ("if_empty", "max_pairs", "dataset", "tokenizer_sentences"):
        del old["data"][key]
    for key in ("metric", "early_stopping_patience"):
        del old["training"][key]
    note.write_text(json.dumps(old))
    pairs = ["en-de", "en-fr", "de-en"]
    same = recipe(folder=str(corpus), pairs=pairs, temperature=2, test="test")
    assert train(same, tmp_path / "out", progress=False).steps == 2
    other = recipe(folder=str(corpus), pairs=pairs, temperature=2, test="test", if_duplicate="skip")
    with pytest.raises(ValueError, match=r"data\.if_duplicate was keep, is skip"):
        train(other, tmp_path / "out", progress=False)


def test_an_entry_of_pairs_may_say_where_its_text_lies(corpus: Path, tmp_path: Path) -> None:
    rows = {"english": lines("en", "train"), "french": lines("fr", "train")}
    datasets.Dataset.from_dict(rows).to_json(tmp_path / "fr.jsonl")
    named = {"train_files": str(tmp_path / "fr.jsonl"), "source_column": "english", "target_column": "french"}
    validation = [str(corpus / f"val.{language}") for language in ("en", "fr")]
    entry = {"source": "en", "target": "fr", **named, "validation_files": validation}
    data = recipe(folder=str(corpus), pairs=["en-de", entry]).data
    texts = read_splits(data)
    assert list(texts["train"].targets) == lines("de", "train") + lines("fr", "train")
    assert list(texts["val"].targets) == lines("de", "val") + lines("fr", "val")
    assert [part.language for part in texts["train"].parts] == ["de", "fr"]


def test_test_files_are_scored(corpus: Path, tmp_path: Path) -> None:
    files = [str(corpus / f"test.{language}") for language in ("en", "de")]
    data = locate_data(recipe(folder=str(corpus), source="en", target="de", test_files=files), tmp_path)
    assert list(read_splits(data)["test"].targets) == lines("de", "test")


def test_the_tokenizer_sees_an_even_share_of_large_text(corpus: Path) -> None:
    text = read_splits(recipe(folder=str(corpus), pairs=["en-de", "de-en"]).data)["train"]
    everything = [*lines("en", "train"), *lines("de", "train"), *lines("de", "train"), *lines("en", "train")]
    assert list(sentences(text, 10_000)) == list(sentences(text, 240)) == everything
    some = list(sentences(text, 60))
    assert len(some) == 60
    assert some[:15] == lines("en", "train")[::4]


def test_defects_are_shown_and_noted(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    english = lines("en", "train")
    english[3], english[7], english[9] = "", "x\ufffd", " ".join(WORDS * 9)
    (tmp_path / "corpus" / "train.en").write_text("\n".join(english) + "\n", "utf-8")
    defective = recipe(folder=str(tmp_path / "corpus"), source="en", target="de", if_replacement_character="skip")
    train(defective, tmp_path / "out", progress=True)
    shown = capsys.readouterr().out
    assert "train: 58 of 60 sentence pairs" in shown
    assert "  1 pair with an empty source (skipped): line 4" in shown
    assert "  1 pair with U+FFFD, left by a broken conversion (skipped): line 8" in shown
    assert "train, in tokens: 1 pair too long (skipped): line 10" in shown
    noted = read_json(tmp_path / "out" / "manifest.json")["data"]["train"]
    assert noted["kept"] == 57
    assert noted["defects"]["too_long"] == {"count": 1, "lines": [10], "action": "skip"}
    assert list(noted["defects"]) == ["empty_source", "replacement_character", "too_long"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source_column=englsh"], "did you mean 'english'?"),
        (["data.dataset=gone.jsonl"], "There is no file or folder gone.jsonl"),
        (["data.dataset=nobody/nothing"], "as a dataset of the Hub it cannot be read"),
        (["data.target_column=n"], "row 1: the column 'n' must hold text, but holds 1 (int)"),
        (["data.validation=dev"], "is one file, whose only split is train"),
        (["data.if_empty=refuse"], "1 pair with an empty source (refused): row 2"),
        (["data.if_empty=drop"], "if_empty"),
        (["data.folder=x"], "give `folder` (x) or `dataset` (t.jsonl), not both"),
        (["data.pairs=[en-de]"], "give `pairs`, or `source` and `target`, not both"),
        (["data.pairs=[english]", "data.source=null", "data.target=null"], "must look like en-de"),
        (["data.pairs=[en-de, en-de]", "data.source=null", "data.target=null"], "has en-de more than once"),
        (
            ["data.pairs=[{source: en, target: de, fodler: x}]", "data.source=null", "data.target=null"],
            "has no key `fodler` (did you mean `folder`?)",
        ),
        (["data.temperature=0.5"], "`temperature` must be at least 1, but is 0.5"),
        (["data.validation_files=[v.en, v.de, v.fr]"], "give two aligned text files"),
        (["data.validation_files=[v.en, v.de]"], "v.en has 2 lines and v.de has 1"),
        (["data.dataset=null", "data.folder=."], "has no train.en or train.en.gz"),
    ],
)
def test_mistakes_are_one_message_and_leave_no_work(
    changes: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text('{"english": "a", "de": "b", "n": 1}\n{"english": "", "de": "c", "n": 2}\n')
    Path("v.en").write_text("a\nb\n")
    Path("v.de").write_text("a\n")
    base = ["data.dataset=t.jsonl", "data.source=en", "data.target=de", "data.source_column=english"]
    if not any(change.startswith("data.validation") for change in changes):
        base.append("data.validation_files=t.jsonl")
    assert main(["train", "tiny-sparse", *base, *changes, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_recipe_of_pairs_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        "data:\n  folder: f\n  pairs:\n    - en-no\n    - {source: en, target: pt-BR, dataset: some/set}\n"
    )
    places = load_recipe(path).data.places()
    assert [(place.name, place.folder, place.dataset) for place in places] == [
        ("en-no", "f", None),
        ("en-pt-BR", None, "some/set"),
    ]
    assert DataRecipe().places()[0].name == "source-target"
