"""Reading the text that a model is inspected on: tables, aligned plain files, or a folder of splits, in groups."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparseq.data.lines import read_lines
from sparseq.data.parallel import read_parallel
from sparseq.data.sources import FilePair
from sparseq.data.tables import column_names, is_table, open_files
from sparseq.tokenization_sparseq import source_prefix

# A column with more values than this names examples, not groups of them.
MAX_GROUPS = 256


@dataclass
class Group:
    """Examples that are looked at together.

    Attributes:
        name: What the group is called in tables and pictures.
        sources: Source texts, none of them blank.
        targets: The target text of each source, or None where only sources are known.
        languages: The target language of each source, whose tag is put before the source where the tokenizer has
            it; None for no tag.
        skipped: Examples left out because their source or target is missing or blank.
        needs_tag: Whether a language without a tag is an error, because the user named it for that purpose.
    """

    name: str
    sources: list[str] = field(default_factory=list)
    targets: list[str] | None = None
    languages: list[str | None] = field(default_factory=list)
    skipped: int = 0
    needs_tag: bool = False

    def __len__(self) -> int:
        return len(self.sources)

    def add(self, source: str | None, target: str | None, language: str | None) -> None:
        """Add an example, or count it as skipped where there is nothing to look at."""
        if not (source and source.strip()) or (self.targets is not None and not (target and target.strip())):
            self.skipped += 1
            return
        self.sources.append(source)
        self.languages.append(language)
        if self.targets is not None:
            assert target is not None
            self.targets.append(target)

    def tagged_sources(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The sources as the model is to read them: with the tag of the target language in front where there is one.

        Raises:
            ValueError: The user named a language that the tokenizer has no tag for.
        """
        prefixes = {code: self._prefix(tokenizer, code) for code in set(self.languages) if code is not None}
        missing = sorted(code for code, prefix in prefixes.items() if not prefix)
        if missing and self.needs_tag:
            tags = ", ".join(getattr(tokenizer, "language_tags", [])) or "none"
            raise ValueError(f"The tokenizer has no tag for the language {missing[0]!r}; its language tags: {tags}.")
        texts = []
        for source, language in zip(self.sources, self.languages, strict=True):
            prefix = "" if language is None else prefixes[language]
            # Text that was prepared for training has its tag already.
            texts.append(source if source.startswith(prefix.rstrip() or "\0") else prefix + source)
        return texts

    def _prefix(self, tokenizer: PreTrainedTokenizerBase, language: str) -> str:
        try:
            return source_prefix(tokenizer, language)
        except ValueError:
            # The ending of a file may be anything.
            if self.needs_tag:
                raise
            return ""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """One `--data` with the options that belong to it.

    Attributes:
        path: A table (.jsonl, .json, .csv, .tsv, .parquet), a plain text file, or a folder with SPLIT.LANGUAGE[.gz].
        split, source: Of a folder: the split and the source language.
        target: Of a folder: the target language. Of a plain file: the file with the translations.
        tag: Target language to put the tag of before each source; of a folder, and of a plain file whose translations
            end in it, it follows from `target`.
        source_column, target_column: Of a table. Without `target_column`, the column "target" if there is one.
        tag_column: Of a table: the column with the target language of each row.
        by: Of a table: the column whose values are the groups. In all of these, `a.b` is the field b of a column a.
    """

    path: Path
    split: str | None = None
    source: str | None = None
    target: str | None = None
    tag: str | None = None
    source_column: str = "source"
    target_column: str | None = None
    tag_column: str | None = None
    by: str | None = None

    @property
    def kind(self) -> str:
        """ "folder", "table" or "plain text".

        Raises:
            FileNotFoundError: There is nothing at `path`.
        """
        if self.path.is_dir():
            return "folder"
        if not self.path.is_file():
            raise FileNotFoundError(f"--data {self.path}: there is no such file or folder.")
        return "table" if is_table(self.path) else "plain text"


def read_groups(data: Sequence[DataOptions], max_examples: int = 1000) -> list[Group]:
    """Read all data; the groups come in the order in which they are first met.

    Args:
        data: What to read. Each is one group, unless `by` splits it.
        max_examples: The first so many examples of each group are read; 0 reads all.

    Raises:
        FileNotFoundError: A file, or a file of a split, is missing.
        ValueError: A file cannot be read, has no example or lacks a column, or two files do not have as many lines.
    """
    limit = max_examples or None
    groups: list[Group] = []
    for options in data:
        found = _READERS[options.kind](options, limit)
        if not any(found):
            skipped = sum(group.skipped for group in found)
            reason = f"all {skipped:,} examples have a blank source or target" if skipped else "it holds no example"
            raise ValueError(f"--data {options.path}: there is nothing to look at, because {reason}.")
        if options.by is not None and len(data) > 1:
            for group in found:
                group.name = f"{options.path.name}: {group.name}"
        groups += [group for group in found if len(group)]
    _make_names_unique(groups, data)
    return groups


def _read_folder(options: DataOptions, limit: int | None) -> list[Group]:
    split = options.split or "test"
    if options.source is None:
        raise ValueError(f"--data {options.path} is a folder: name the language to read with --source, such as en.")
    # Sources alone are read as their own translation.
    text = read_parallel(options.path, split, options.source, options.target or options.source, drop_empty=False)
    languages = options.source if options.target is None else f"{options.source}-{options.target}"
    targets = None if options.target is None else text.targets
    return [_from_lines(options, f"{split} {languages}", text.sources, targets, options.target, limit)]


def _read_plain(options: DataOptions, limit: int | None) -> list[Group]:
    name = _without_gz(options.path).name
    if options.target is None:
        return [_from_lines(options, name, read_lines(options.path), None, None, limit)]
    other = Path(options.target)
    if not other.is_file():
        raise FileNotFoundError(
            f"--target {other}: there is no such file. For the plain text {options.path}, --target names the file "
            "with the translation of each of its lines."
        )
    # Both files are read to the end, so that a shift between them is noticed.
    pairs = [pair for batch in FilePair(options.path, other).batches() for pair in zip(*batch, strict=True)]
    language = _without_gz(other).suffix.removeprefix(".") or None
    sources, targets = ([str(side) for side in sides] for sides in zip(*pairs, strict=True))
    return [_from_lines(options, name, sources, targets, language, limit)]


def _from_lines(
    options: DataOptions,
    name: str,
    sources: Iterable[str],
    targets: Sequence[str] | None,
    language: str | None,
    limit: int | None,
) -> Group:
    language = options.tag or language
    group = Group(name, targets=None if targets is None else [], needs_tag=options.tag is not None)
    for row, source in enumerate(sources):
        if len(group) == limit:
            break
        group.add(source, None if targets is None else targets[row], language)
    return group


def _read_table(options: DataOptions, limit: int | None) -> list[Group]:
    groups: dict[str, Group] = {}
    target_column: str | None = None
    table = open_files([options.path], text_columns=[options.source_column, options.target_column or "target"])
    for row, record in enumerate(table.records()):
        if row == 0:
            target_column = _check_columns(options, column_names(table.schema()))
        name = options.path.name if options.by is None else _label(_field(record, options.by))
        if name not in groups:
            if len(groups) == MAX_GROUPS:
                raise ValueError(
                    f"--by {options.by}: that column of {options.path} has more than {MAX_GROUPS} values; choose one "
                    "that names a few groups, such as a language."
                )
            needs_tag = options.tag is not None or options.tag_column is not None
            groups[name] = Group(name, targets=None if target_column is None else [], needs_tag=needs_tag)
        group = groups[name]
        if len(group) == limit:
            if options.by is None:
                break
            continue
        language = options.tag if options.tag_column is None else _field(record, options.tag_column)
        target = None if target_column is None else _text(record, target_column, options.path, row)
        source = _text(record, options.source_column, options.path, row)
        group.add(source, target, None if language is None else str(language))
    return list(groups.values())


def _check_columns(options: DataOptions, columns: list[str]) -> str | None:
    """Refuse columns that are not there; returns the column of the targets."""
    for option, name in (
        ("--source-column", options.source_column),
        ("--target-column", options.target_column),
        ("--tag-column", options.tag_column),
        ("--by", options.by),
    ):
        if name is not None and name not in columns:
            raise ValueError(
                f"{option} {name}: {options.path} has no such column. Its columns: {', '.join(columns)}. Name the one "
                f"you mean with {option}."
            )
    return options.target_column or ("target" if "target" in columns else None)


def _field(record: dict[str, Any], name: str) -> Any:
    """A column or, for `a.b`, the field b of a column a, as the Hub's sets have it: {"translation": {"en": ...}}."""
    if name in record:
        return record[name]
    column, _, inner = name.partition(".")
    with contextlib.suppress(KeyError, TypeError):
        return record[column][inner]
    return None


def _text(record: dict[str, Any], column: str, path: Path, row: int) -> str | None:
    value = _field(record, column)
    if isinstance(value, (dict, list)):
        fields = f"; name one of its fields, such as {column}.{next(iter(value))}" if isinstance(value, dict) else ""
        raise ValueError(
            f"{path}, row {row + 1}: the column {column!r} must hold text, but holds {value!r:.80}{fields}."
        )
    return None if value is None else str(value)


def _label(value: Any) -> str:
    return "(none)" if value is None or value == "" else str(value)


def _without_gz(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path


def _make_names_unique(groups: Sequence[Group], data: Sequence[DataOptions]) -> None:
    """Files of one name in several folders get the folder before it, and what is still alike a number."""
    names = [group.name for group in groups]
    if len(groups) == len(data) and len(set(names)) < len(names):
        for group, options in zip(groups, data, strict=True):
            if names.count(group.name) > 1:
                folder = options.path if options.path.is_dir() else options.path.parent
                group.name = f"{folder.resolve().name}/{group.name}"
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        if seen[group.name] > 1:
            group.name = f"{group.name} ({seen[group.name]})"


_READERS = {"folder": _read_folder, "plain text": _read_plain, "table": _read_table}

__all__ = ["MAX_GROUPS", "DataOptions", "Group", "read_groups"]
