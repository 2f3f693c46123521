"""Reading text in groups: every form of data, what is left out, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from sparseq.inspection.examples import MAX_GROUPS, DataOptions, Group, read_groups

ROWS = [
    {"source": "A man .", "target": "Ein Mann .", "lang": "de", "n": 1},
    {"source": 'Two dogs, or 3 "cats"', "target": "NA", "lang": "fr", "n": 2},
    {"source": "None", "target": "Zwei", "lang": "de", "n": 3},
]


def write_table(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows in the format that the name's ending says."""
    path = folder / name
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    table = datasets.Dataset.from_list(rows)
    if plain.suffix == ".parquet":
        table.to_parquet(plain)
    elif plain.suffix in (".csv", ".tsv"):
        table.to_csv(plain, sep="\t" if plain.suffix == ".tsv" else ",")
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows), "utf-8")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


def read(path: Path, max_examples: int = 0, **options: Any) -> list[Group]:
    return read_groups([DataOptions(path=path, **options)], max_examples)


@pytest.mark.parametrize(
    "name",
    [
        "t.jsonl",
        "t.json",
        "t.ndjson",
        "t.csv",
        "t.tsv",
        "t.parquet",
        "t.jsonl.gz",
        "t.csv.gz",
        "t.tsv.gz",
        "t.json.gz",
    ],
)
def test_every_kind_of_table(name: str, tmp_path: Path) -> None:
    (group,) = read(write_table(tmp_path, name))
    assert group.name == name
    assert group.sources == [row["source"] for row in ROWS]
    assert group.targets == [row["target"] for row in ROWS]
    assert group.languages == [None] * 3


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_groups_by_a_column(name: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, name)
    found = read(path, by="lang", tag_column="lang")
    assert [(group.name, group.sources, group.languages) for group in found] == [
        ("de", ["A man .", "None"], ["de", "de"]),
        ("fr", ['Two dogs, or 3 "cats"'], ["fr"]),
    ]
    assert [group.name for group in read(path, by="n")] == ["1", "2", "3"]


def test_fields_of_a_column(tmp_path: Path) -> None:
    rows = [{"translation": {"en": "A", "de": "B"}, "info": {"lang": "x"}}, {"translation": {"en": "C", "de": "D"}}]
    path = write_table(tmp_path, "t.jsonl", rows)
    found = read(path, source_column="translation.en", target_column="translation.de", by="info.lang")
    assert [(group.name, group.sources, group.targets) for group in found] == [
        ("x", ["A"], ["B"]),
        ("(none)", ["C"], ["D"]),
    ]


def test_a_table_without_targets(tmp_path: Path) -> None:
    path = write_table(tmp_path, "t.jsonl", [{"text": "A", "target": "B"}, {"text": "C", "target": "D"}])
    (group,) = read(path, source_column="text")
    assert group.targets == ["B", "D"], 'the column "target" needs no naming'
    (group,) = read(write_table(tmp_path, "u.jsonl", [{"text": "A", "label": "B"}]), source_column="text")
    assert group.targets is None


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_plain_text(ending: str, tmp_path: Path) -> None:
    # Only a newline ends a line; a form feed does not.
    texts = {"test.en": "One\fline\nTwo\n", "other.de": "Eine\r\nZwei\r\n"}
    for name, text in texts.items():
        data = text.encode("utf-8")
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(data) if ending else data)
    (group,) = read(tmp_path / f"test.en{ending}", target=str(tmp_path / f"other.de{ending}"))
    assert (group.name, group.sources, group.targets) == ("test.en", ["One\fline", "Two"], ["Eine", "Zwei"])
    assert group.languages == ["de", "de"]
    assert not group.needs_tag
    (alone,) = read(tmp_path / f"test.en{ending}")
    assert (alone.sources, alone.targets, alone.languages) == (["One\fline", "Two"], None, [None, None])


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name, text in {"test.en": "a\n\nc\n", "test.de": "A\nB\nC\n", "val.en": "v\n"}.items():
        (tmp_path / name).write_text(text, "utf-8")
    (group,) = read(tmp_path, source="en", target="de")
    assert (group.name, group.sources, group.targets) == ("test en-de", ["a", "c"], ["A", "C"])
    assert (group.languages, group.skipped) == (["de", "de"], 1)
    (alone,) = read(tmp_path, split="val", source="en")
    assert (alone.name, alone.sources, alone.targets, alone.languages) == ("val en", ["v"], None, [None])


def test_blank_sides_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"source": "a", "target": "A"},
        {"source": " ", "target": "B"},
        {"source": "c", "target": None},
        {"source": None, "target": "D"},
        {"source": "e", "target": "E"},
    ]
    (group,) = read(write_table(tmp_path, "t.jsonl", rows))
    assert (group.sources, group.targets, group.skipped) == (["a", "e"], ["A", "E"], 3)


def test_the_first_examples_of_each_group(tmp_path: Path) -> None:
    rows = [{"source": f"{lang}{i}", "lang": lang} for i in range(5) for lang in ("x", "y")]
    path = write_table(tmp_path, "t.jsonl", [*rows, {"source": "late", "lang": "z"}])
    found = read(path, 2, by="lang")
    assert {group.name: group.sources for group in found} == {"x": ["x0", "x1"], "y": ["y0", "y1"], "z": ["late"]}
    (group,) = read(path, 3)
    assert group.sources == ["x0", "y0", "x1"]
    (tmp_path / "t.en").write_text("a\n\nb\nc\n", "utf-8")
    (plain,) = read(tmp_path / "t.en", 2)
    assert plain.sources == ["a", "b"], "a blank line is not an example"


def test_names_of_several_groups_differ(tmp_path: Path) -> None:
    paths = []
    for folder in ("news", "talks"):
        (tmp_path / folder).mkdir()
        paths.append(write_table(tmp_path / folder, "t.jsonl"))
    (tmp_path / "a.txt").write_text("x\n", "utf-8")
    data = [*(DataOptions(path=path) for path in [*paths, paths[0]]), DataOptions(path=tmp_path / "a.txt")]
    assert [group.name for group in read_groups(data)] == [
        "news/t.jsonl",
        "talks/t.jsonl",
        "news/t.jsonl (2)",
        "a.txt",
    ]
    both = [DataOptions(path=paths[0], by="lang"), DataOptions(path=tmp_path / "a.txt")]
    assert [group.name for group in read_groups(both)] == ["t.jsonl: de", "t.jsonl: fr", "a.txt"]


def test_tags_of_the_target_language(tokenizer: PreTrainedTokenizerBase) -> None:
    group = Group("g", sources=["a", "<2de> b", "c", "d"], languages=["de", "de", None, "it"])
    assert group.tagged_sources(tokenizer) == ["<2de> a", "<2de> b", "c", "d"]
    # An ending of a file, which says nothing about a language.
    assert Group("g", sources=["a"], languages=["2016"]).tagged_sources(tokenizer) == ["a"]
    with pytest.raises(ValueError, match=r"no tag for the language 'it'; its language tags: <2de>, <2fr>"):
        Group("g", sources=["a"], languages=["it"], needs_tag=True).tagged_sources(tokenizer)
    with pytest.raises(ValueError, match="'2016' is not a language code"):
        Group("g", sources=["a"], languages=["2016"], needs_tag=True).tagged_sources(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source_column": "text"},
            r"--source-column text: .*t\.jsonl has no such column. .*: source, target, lang, n",
        ),
        ({"target_column": "goal"}, r"--target-column goal: .*: source, target, lang, n"),
        ({"by": "language"}, r"--by language: .*: source, target, lang, n"),
        ({"tag_column": "tongue"}, r"--tag-column tongue: .*: source, target, lang, n"),
        ({"source_column": "lang.x"}, r"--source-column lang\.x"),
    ],
)
def test_a_column_that_is_not_there(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_table(tmp_path, "t.jsonl"), **options)


def test_a_column_of_fields_is_not_text(tmp_path: Path) -> None:
    path = write_table(tmp_path, "t.jsonl", [{"translation": {"en": "A"}}])
    with pytest.raises(ValueError, match=r"row 1: the column 'translation' must hold text.*such as translation\.en"):
        read(path, source_column="translation")


def test_a_column_with_too_many_values(tmp_path: Path) -> None:
    rows = [{"source": "a", "id": i} for i in range(MAX_GROUPS + 1)]
    with pytest.raises(ValueError, match=r"--by id: that column of .* has more than 256 values"):
        read(write_table(tmp_path, "t.jsonl", rows), by="id")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "it holds no example"),
        ("empty.en", b"", "it holds no example"),
        ("head.csv", b"source,target\n", "it holds no example"),
        ("blank.en", b"\n \n", "all 2 examples have a blank source"),
        ("broken.jsonl", b'{"source": "a"\n{', r"broken\.jsonl cannot be read as JSON"),
        ("broken.parquet", b"not parquet at all", r"broken\.parquet cannot be read as PARQUET"),
        ("broken.csv.gz", b"not gzip", r"broken\.csv\.gz cannot be read as CSV"),
        ("latin.en", "Männer\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_files_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("1\n2\n", "utf-8")
    (tmp_path / "a.de").write_text("1\n", "utf-8")
    with pytest.raises(FileNotFoundError, match=r"--data .*b\.en: there is no such file"):
        read(tmp_path / "b.en")
    with pytest.raises(FileNotFoundError, match=r"--target .*b\.de: there is no such file"):
        read(tmp_path / "a.en", target=str(tmp_path / "b.de"))
    with pytest.raises(ValueError, match=r"a\.en has 2 lines and .*a\.de has 1"):
        read(tmp_path / "a.en", target=str(tmp_path / "a.de"))
    with pytest.raises(ValueError, match="is a folder: name the language to read with --source"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no test\.en"):
        read(tmp_path, source="en")
