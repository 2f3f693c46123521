"""Tables and aligned files: the same pairs through every door, and one clear message for every mistake."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from sparseq.data.cleaning import Policy
from sparseq.data.parallel import read_pairs
from sparseq.data.sources import FilePair, PairPlace, parse_pair
from sparseq.data.tables import open_files, open_table

# What readers like to change: missing-value words, numbers, quotes, separators, line ends inside a sentence.
EN = ["None", "007", 'He said "no", twice.', "a\tb; c, d", "A\u2028B", "NA", " padded ", "plain"] * 3
DE = ["NA", "1e3", "Er sagte „nein“.", "true", "null", "Straße", "-", "\u00a0x"] * 3


def table(nested: bool = False) -> datasets.Dataset:
    pairs = [{"en": en, "de": de} for en, de in zip(EN, DE, strict=True)]
    return datasets.Dataset.from_list([{"translation": pair} for pair in pairs] if nested else pairs)


def write(path: Path, nested: bool = False) -> Path:
    """Write the pairs in the format that the ending names; a folder gets three splits."""
    rows = table(nested)
    name = path.name.removesuffix(".gz")
    plain = path.with_name(name)
    if name.endswith(".jsonl"):
        rows.to_json(plain, force_ascii=False)
    elif name.endswith(".json"):
        plain.write_text(json.dumps(list(rows)), "utf-8")
    elif name.endswith(".csv"):
        rows.to_csv(plain, index=False)
    elif name.endswith(".tsv"):
        rows.to_csv(plain, index=False, sep="\t")
    elif name.endswith(".parquet"):
        rows.to_parquet(plain)
    elif name == "saved":
        datasets.DatasetDict({"train": rows, "validation": rows, "test": rows}).save_to_disk(plain)
    else:
        plain.mkdir()
        for split in ("train", "validation", "test"):
            rows.to_json(plain / f"{split}.jsonl")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def read(place: PairPlace, split: str = "train") -> list[tuple[str, str]]:
    text = read_pairs(place.open(split), split, Policy())
    return list(zip(text.sources, text.targets, strict=True))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


FORMATS = ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.jsonl.gz", "t.csv.gz", "saved", "folder"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    place = PairPlace("en", "de", dataset=str(write(tmp_path / name)))
    assert read(place) == list(zip(EN, DE, strict=True))
    # Local files leave no copy behind.
    assert list((tmp_path / "hf").rglob("*.arrow")) == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "saved", "folder"])
@pytest.mark.parametrize("columns", [(None, None), ("translation.en", "translation.de")])
def test_fields_of_a_column(name: str, columns: tuple[str | None, str | None], tmp_path: Path) -> None:
    path = write(tmp_path / name, nested=True)
    place = PairPlace("en", "de", dataset=str(path), source_column=columns[0], target_column=columns[1])
    assert read(place) == list(zip(EN, DE, strict=True))


def test_columns_named_source_and_target_need_no_language(tmp_path: Path) -> None:
    table().rename_columns({"en": "source", "de": "target"}).to_json(tmp_path / "t.jsonl")
    assert read(PairPlace(dataset=str(tmp_path / "t.jsonl")))[7] == ("plain", "\u00a0x")


def test_text_files_come_back_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(EN) + "\n", "utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(DE).encode()))
    place = PairPlace(files=(("train", (str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz"))),))
    assert read(place) == list(zip(EN, DE, strict=True))


def test_several_tables_are_read_one_after_another(tmp_path: Path) -> None:
    names = tuple(str(write(tmp_path / f"{part}.jsonl")) for part in "ab")
    assert read(PairPlace("en", "de", files=(("train", names),))) == 2 * list(zip(EN, DE, strict=True))


def test_files_of_a_split_come_before_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "v.en").write_text("x\n")
    (tmp_path / "v.de").write_text("y\n")
    own = (("val", (str(tmp_path / "v.en"), str(tmp_path / "v.de"))),)
    place = PairPlace("en", "de", dataset=str(write(tmp_path / "t.jsonl")), files=own)
    assert (len(read(place)), read(place, "val")) == (len(EN), [("x", "y")])


def test_a_pair_s_own_files_come_before_those_of_the_language(tmp_path: Path) -> None:
    for name, line in (
        ("train.en", "all"),
        ("train.de", "alle"),
        ("train.en-de.en", "own"),
        ("train.en-de.de", "eigen"),
    ):
        (tmp_path / name).write_text(line + "\n")
    (tmp_path / "train.fr").write_text("tous\n")
    assert read(PairPlace("en", "de", folder=str(tmp_path))) == [("own", "eigen")]
    assert read(PairPlace("de", "en", folder=str(tmp_path))) == [("eigen", "own")]
    assert read(PairPlace("en", "fr", folder=str(tmp_path))) == [("all", "tous")]


@pytest.mark.parametrize("name", ["saved", "folder"])
def test_a_split_is_found_under_the_name_that_datasets_gives_it(name: str, tmp_path: Path) -> None:
    place = PairPlace("en", "de", dataset=str(write(tmp_path / name)))
    assert read(place, "val") == read(place, "validation") == list(zip(EN, DE, strict=True))
    with pytest.raises(ValueError, match=r"has no split 'tset'. Its splits: train, validation, test"):
        place.open("tset")


def test_a_slice_of_a_split(tmp_path: Path) -> None:
    place = PairPlace("en", "de", dataset=str(write(tmp_path / "folder")))
    assert read(place, "train[:5]") + read(place, "train[5:]") == read(place)
    first, rest = place.open("train[:5]"), place.open("train[5:]")
    assert first.options != rest.options


def test_a_missing_value_is_an_empty_side(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"en": "a", "de": "b"}\n{"en": null, "de": "c"}\n{"en": "d"}\n')
    text = read_pairs(PairPlace("en", "de", dataset=str(tmp_path / "t.jsonl")).open("train"), "train", Policy())
    assert list(text.sources) == ["a"]
    assert {kind: defect.lines for kind, defect in text.report.defects.items()} == {
        "empty_source": (2,),
        "empty_target": (3,),
    }
    assert "row 2" in str(text.report)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_known_by_its_commit(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(source: str, config: str | None, **options: Any) -> Any:
        asked.append((source, config, options))
        rows = table(nested=True)
        return {"train": rows.to_iterable_dataset() if options["streaming"] else rows}

    builder = SimpleNamespace(hash="0123abc", config=None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source, config: builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    place = PairPlace("en", "de", dataset="some/set", dataset_config="de-en", streaming=streaming)
    assert read(place) == list(zip(EN, DE, strict=True))
    assert place.open("train").files == {"some/set, de-en": "0123abc"}
    assert asked[0] == ("some/set", "de-en", {"streaming": streaming})


def test_hashes_tell_contents_apart_and_not_places(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl")
    before = open_table(str(path)).files
    shutil.copytree(write(tmp_path / "folder"), tmp_path / "moved")
    assert open_table(str(tmp_path / "folder")).files == open_table(str(tmp_path / "moved")).files
    path.write_text(path.read_text().replace("plain", "plaim"))
    after = open_table(str(path)).files
    assert before.keys() == after.keys() == {"t.jsonl"}
    assert before != after


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            {"source_column": "englsh"},
            r"t\.jsonl has no column 'englsh' \(did you mean 'english'\?\).*: english, de",
        ),
        ({}, r"t\.jsonl has no column 'en' or 'translation\.en' or 'source' for the source.*data\.source_column=NAME"),
        ({"source_column": "n"}, r"t\.jsonl, row 1: the column 'n' must hold text, but holds 1 \(int\)"),
        ({"source_column": "english.x"}, "has no column 'english.x'"),
        ({"dataset": "gone.csv"}, "no file or folder gone.csv"),
        ({"dataset": "./gone"}, "no file or folder ./gone"),
        (
            {"dataset": "nobody/nothing"},
            "no file or folder nobody/nothing, and as a dataset of the Hub it",
        ),
        ({"split": "val"}, r"t\.jsonl is one file, whose only split is train, so there is no split 'val'"),
        ({"dataset": "broken.json"}, r"broken\.json cannot be read as JSON"),
        ({"dataset": "broken.parquet"}, r"broken\.parquet cannot be read as PARQUET"),
        ({"dataset": "latin.csv", "source_column": "a"}, r"latin\.csv cannot be read as CSV.*utf-8"),
        ({"dataset": "ragged.csv", "source_column": "a"}, r"ragged\.csv cannot be read as CSV"),
        ({"dataset": "empty.csv"}, r"empty\.csv is empty"),
        ({"dataset": "nested.jsonl", "source_column": "t"}, r"row 1: the column 't' must hold text.*such as t\.en"),
    ],
)
def test_mistakes(place: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text('{"english": "a", "de": "b", "n": 1}\n')
    Path("nested.jsonl").write_text('{"t": {"en": "a"}, "de": "b"}\n')
    Path("broken.json").write_text('{"english": "a"')
    Path("broken.parquet").write_text("no parquet")
    Path("latin.csv").write_bytes(b"a,de\nf\xfcnf,b\n")
    Path("ragged.csv").write_text("a,de\nx,y\nx,y,z,u\n")
    Path("empty.csv").write_text("")
    split = place.pop("split", "train")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(PairPlace(**{"source": "en", "target": "de", "dataset": "t.jsonl", **place}), split)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train.en",), "give two aligned text files, source first, or tables"),
        (("train.en", "train.dee"), r"There is no file .*train\.dee.* Did you mean train\.de\?"),
        (("t.jsonl", "u.csv"), "are of several kinds"),
        (("u.jsonl",), r"no file .*u\.jsonl\. Did you mean t\.jsonl\?"),
    ],
)
def test_mistakes_in_named_files(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for name in ("train.en", "train.de", "t.jsonl", "u.csv"):
        (tmp_path / name).write_text("x\n")
    named = tuple(str(tmp_path / name) for name in files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PairPlace("en", "de", files=(("train", named),)).open("train")


def test_a_folder_without_the_language_names_what_is_there(tmp_path: Path) -> None:
    for name in ("train.en", "train.de"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(FileNotFoundError, match=r"no train\.ger or train\.ger\.gz\. It has: train\.de, train\.en"):
        PairPlace("en", "ger", folder=str(tmp_path)).open("train")
    with pytest.raises(FileNotFoundError, match=r"no tran\.en .*Did you mean train\.en\?"):
        PairPlace("en", "de", folder=str(tmp_path)).open("tran")
    with pytest.raises(ValueError, match="name them, source and target"):
        PairPlace(folder=str(tmp_path)).open("train")
    with pytest.raises(ValueError, match="no text for the split 'val'"):
        PairPlace("en", "de").open("val")


def test_lines_that_do_not_align_are_counted_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x\n" * 2500)
    (tmp_path / "b").write_text("x\n" * 1003)
    with pytest.raises(ValueError, match=r"a has 2,500 lines and .*b has 1,003: line i"):
        list(FilePair(tmp_path / "a", tmp_path / "b").batches())


@pytest.mark.parametrize(
    ("text", "pair"), [("en-de", ("en", "de")), ("en>pt-BR", ("en", "pt-BR")), ("zho_Hans-en", ("zho_Hans", "en"))]
)
def test_language_pairs(text: str, pair: tuple[str, str]) -> None:
    assert parse_pair(text) == pair


@pytest.mark.parametrize("text", ["en", "en-", "en-pt-BR", "", "a>b>c"])
def test_what_is_no_language_pair(text: str) -> None:
    with pytest.raises(ValueError, match=r"must look like en-de, or like en>pt-BR"):
        parse_pair(text)


def test_only_columns_of_text_stay_text_in_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("code,n\n007,7\nNA,8\n")
    opened = open_files([tmp_path / "t.csv"], text_columns=["code"])
    assert list(opened.records()) == [{"code": "007", "n": 7}, {"code": "NA", "n": 8}]
