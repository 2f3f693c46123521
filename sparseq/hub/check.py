"""Whether a folder is ready for the Hub: what it holds and what it lacks, found by reading, never by executing.

`sparseq.hub.alone` is the other half of the check: it loads what would be uploaded where this package is missing.
"""

import ast
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers.dynamic_module_utils import get_relative_imports
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from sparseq.hub.card_check import check_card
from sparseq.hub.contents import LARGEST, MODEL_WEIGHTS, Entry, format_size, read_contents
from sparseq.hub.eval_results import FOLDER as EVAL_RESULTS
from sparseq.hub.eval_results import check_eval_results
from sparseq.hub.facts import is_draft, is_ours
from sparseq.hub.ids import is_hub_id
from sparseq.loading import ADAPTER, INDEX, MODEL_CLASSES, WHOLE, check_weights, read_json, tensor_files
from sparseq.modeling_sparseq import AUTO_MAP, CODE_FILES

Kind = Literal["model", "adapter"]

TOKENIZER_CONFIG = "tokenizer_config.json"
"""What every tokenizer has, whatever else it is read from."""

SAVE_AGAIN = "save the model again with `save_pretrained`"

_REFERENCE = re.compile(r"(?P<module>[A-Za-z_]\w*)\.(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True, kw_only=True)
class FolderCheck:
    """What a folder that is to be uploaded holds and lacks.

    Attributes:
        folder: The folder.
        kind: A whole model, or an adapter of PEFT that needs its base model.
        entries: Every file, and what becomes of it.
        problems: Why it cannot be uploaded, a sentence each; empty if it can.
        notes: What is worth knowing, but stops nothing.
        auto_class: The auto class that loads the model (of an adapter: its base model).
        base_model: Of an adapter: what it was trained on.
        base_revision: Of an adapter: the revision of that, if it names one.
        grows_vocabulary: Of an adapter: its tokenizer has tokens that the base model has no rows for.
    """

    folder: Path
    kind: Kind
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    auto_class: str = "AutoModelForSeq2SeqLM"
    base_model: str | None = None
    base_revision: str | None = None
    grows_vocabulary: bool = False

    @property
    def uploads(self) -> list[Entry]:
        """What would be uploaded."""
        return [entry for entry in self.entries if entry.fate == "upload"]

    @property
    def size(self) -> int:
        """Bytes that would be uploaded."""
        return sum(entry.size for entry in self.uploads)

    def require_ready(self) -> None:
        """
        Raises:
            ValueError: There are problems; the message lists them.
        """
        if self.problems:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            raise ValueError(f"{self.folder} is not ready for the Hub:{listed}")


def check_for_upload(folder: str | os.PathLike[str]) -> FolderCheck:
    """Check a folder that is to be uploaded, by reading its files.

    A model's folder must have config.json with an `auto_map` for every auto class, every code file that it leads to,
    sound safetensors with the weights of that configuration and no others, a tokenizer that loads without trust,
    generation_config.json if the model generates, and a valid README.md. An adapter's must have what PEFT writes, a
    base model that others can load, and a valid README.md.

    Args:
        folder: A folder that `write_hub_folder`, `save_pretrained`, a Trainer or `sparseq train` has written.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds neither a model nor an adapter.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    kinds = [name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    if not kinds:
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise ValueError(f"{folder} has neither config.json nor adapter_config.json, so it holds no model{hint}")
    return _Reading(folder, "model" if "config.json" in kinds else "adapter").check(both=len(kinds) == 2)


@dataclass
class _Reading:
    """A check in progress: what was read, and what was found wrong."""

    folder: Path
    kind: Kind
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, *, both: bool) -> FolderCheck:
        if both:
            self.problems.append(
                "config.json and adapter_config.json are both there, so transformers would load the adapter upon "
                "another model: push model and adapter from folders of their own"
            )
        card = self._card()
        code: set[str] = set()
        details: dict[str, Any] = {}
        if self.kind == "model":
            config = self._json("config.json")
            classes = self._auto_map(config)
            code = self._code(classes)
            details["auto_class"] = self._auto_class(config, classes)
            self._weights(config)
            self._tokenizer(config.get("vocab_size"))
            if details["auto_class"] == "AutoModelForSeq2SeqLM":
                self._generation_config()
        else:
            details = self._adapter()
        self._eval_results()
        entries = read_contents(self.folder, code=code, card=card)
        refused = [f"{entry.path}: {entry.reason}" for entry in entries if entry.fate == "refuse"]
        return FolderCheck(
            folder=self.folder,
            kind=self.kind,
            entries=tuple(entries),
            problems=(*self.problems, *refused),
            notes=tuple(self.notes),
            **details,
        )

    def _json(self, name: str, hint: str = SAVE_AGAIN) -> dict[str, Any]:
        """The object in a JSON file; an empty one, and a problem, where there is none."""
        path = self.folder / name
        if not path.is_file():
            self.problems.append(f"{name} is missing: {hint}")
        elif path.stat().st_size <= LARGEST:
            try:
                return read_json(path)
            except ValueError as error:
                self.problems.append(str(error))
        return {}

    def _card(self) -> str:
        path = self.folder / "README.md"
        if not path.is_file():
            self.problems.append("README.md, the model card, is missing: `sparseq card FOLDER` writes one")
        elif path.stat().st_size <= LARGEST:
            try:
                text = path.read_text("utf-8")
                check_card(text)
            except ValueError as error:
                self.problems.append(f"README.md: {' '.join(str(error).split())}")
            else:
                if is_draft(text) and not is_ours(text):
                    self.notes.append(
                        "README.md is a draft of Trainer or PEFT: `sparseq card FOLDER` writes a full one"
                    )
                return text
        return ""

    def _eval_results(self) -> None:
        for path in sorted(self.folder.glob(f"{EVAL_RESULTS}/*.y*ml")):
            if path.is_file() and path.stat().st_size <= LARGEST:
                try:
                    check_eval_results(path.read_text("utf-8"))
                except ValueError as error:
                    self.problems.append(f"{EVAL_RESULTS}/{path.name}: {' '.join(str(error).split())}")

    def _auto_map(self, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Auto class to the file and the name of the class that it loads, as far as they are sound."""
        if config and config.get("model_type") != "sparseq":
            self.problems.append(
                f"config.json: `model_type` is {config.get('model_type')!r}, not 'sparseq'; models of the library are "
                "pushed with their own `push_to_hub`"
            )
        found = config.get("auto_map")
        if not isinstance(found, dict):
            if config:
                self.problems.append(
                    f"config.json has no `auto_map`, so nobody without sparseq could load it: {SAVE_AGAIN}"
                )
            return {}
        if missing := sorted(AUTO_MAP.keys() - found.keys()):
            self.problems.append(f"config.json: `auto_map` has no {', '.join(missing)}: {SAVE_AGAIN}")
        classes = {}
        for auto_class, reference in sorted(found.items()):
            match = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
            if match is None:
                self.problems.append(
                    f"config.json: `auto_map` says {reference!r} for {auto_class}, which names no class in a file of "
                    f"this folder: {SAVE_AGAIN}"
                )
            else:
                classes[auto_class] = (f"{match['module']}.py", match["name"])
        return classes

    def _code(self, classes: Mapping[str, tuple[str, str]]) -> set[str]:
        """Names of the files that the `auto_map` leads to, through their imports."""
        defined: dict[str, set[str]] = {}
        waiting = sorted({file for file, _ in classes.values()})
        while waiting:
            name = waiting.pop()
            path = self.folder / name
            if name in defined:
                continue
            defined[name] = set()
            if not path.is_file():
                self.problems.append(f"{name} is missing, which the model's code needs: {SAVE_AGAIN}")
                continue
            try:
                tree = ast.parse(path.read_bytes(), filename=name)
                # What the library will look for, and copy beside the file, when it loads the model.
                waiting += [f"{module}.py" for module in get_relative_imports(path)]
            except (SyntaxError, ValueError, RecursionError) as error:
                self.problems.append(f"{name} is not Python ({error}): was its saving cut short?")
                continue
            defined[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
            self.problems += [f"{name} {complaint}" for complaint in _bad_imports(tree)]
            self._compare(path)
        for auto_class, (file, name) in classes.items():
            if defined[file] and name not in defined[file]:
                self.problems.append(f"{file} has no class {name}, which `auto_map` names for {auto_class}")
        return set(defined)

    def _compare(self, path: Path) -> None:
        ours = Path(__file__).parents[1] / path.name
        if path.name in CODE_FILES and path.read_bytes() != ours.read_bytes():
            self.notes.append(
                f"{path.name} is not the one of this sparseq: another version saved it, or it was edited"
            )

    def _auto_class(self, config: Mapping[str, Any], classes: Mapping[str, tuple[str, str]]) -> str:
        """The auto class of the model that was saved."""
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            if config:
                self.problems.append(f"config.json has no `architectures`, which says what it is: {SAVE_AGAIN}")
            return "AutoModelForSeq2SeqLM"
        for auto_class, (_, name) in classes.items():
            if name == architectures[0]:
                return auto_class
        self.problems.append(
            f"config.json: no auto class in `auto_map` loads {architectures[0]!r}, the first of `architectures`"
        )
        return "AutoModelForSeq2SeqLM"

    def _weights(self, config: Mapping[str, Any]) -> None:
        # Which weights a class of the user's own has, only its code says; that is not run here.
        is_ours = config.get("architectures") in [[name] for name in MODEL_CLASSES]
        try:
            files = check_weights(self.folder) if is_ours else tensor_files(self.folder)
        except FileNotFoundError:
            self.problems.append(f"{WHOLE if self.kind == 'model' else ADAPTER} is missing: {SAVE_AGAIN}")
            return
        except ValueError as error:
            self.problems.append(str(error))
            return
        read = {path.name for path in files.values()}
        read |= {INDEX} if read.isdisjoint({WHOLE, ADAPTER}) else set()
        found = {path.name for pattern in MODEL_WEIGHTS for path in self.folder.glob(pattern)}
        if spare := sorted(found - read):
            self.problems.append(f"{', '.join(spare)}: weights of another save, which nobody would read; remove them")

    def _tokenizer(self, vocab_size: Any) -> None:
        hint = "save the tokenizer into the folder with its `save_pretrained`"
        settings = self._json(TOKENIZER_CONFIG, hint)
        if "auto_map" in settings:
            self.problems.append(
                "tokenizer_config.json has an `auto_map`, so the tokenizer would not load without trust: remove it"
            )
        name = "tokenizer.json"
        if not (self.folder / name).is_file() and (files := _library_files(self.folder, settings)):
            name = next((file for file in files if file.endswith(".json")), files[0])
            tokenizer = {"model": {"vocab": self._json(name)}} if name.endswith(".json") else {}
            self.notes.append(
                f"the tokenizer is a {settings['tokenizer_class']} in {', '.join(files)}: who loads it needs the "
                "packages that this class of the library needs, such as sentencepiece"
            )
        else:
            tokenizer = self._json(name, hint)
        highest = max(_token_ids(tokenizer), default=-1)
        if isinstance(vocab_size, int) and highest >= vocab_size:
            self.problems.append(
                f"{name} has the token id {highest}, but the model's `vocab_size` is {vocab_size}: is it the "
                "tokenizer of this model?"
            )

    def _generation_config(self) -> None:
        generation = self._json("generation_config.json")
        if generation and not generation.keys() & {"max_length", "max_new_tokens"}:
            self.notes.append(
                "generation_config.json sets no `max_length`, so generate() will stop after 20 tokens unless told "
                "otherwise"
            )

    def _adapter(self) -> dict[str, Any]:
        config = self._json("adapter_config.json")
        base = config.get("base_model_name_or_path")
        if not base:
            self.problems.append("adapter_config.json does not say `base_model_name_or_path`, which others must load")
        elif not is_hub_id(base, may_lack_owner=True) or os.path.exists(base):
            self.problems.append(
                f"adapter_config.json: the base model {base!r} is a folder of this machine, or no id on the Hub. Push "
                "it first and write its id into `base_model_name_or_path`, or push the merged model in place of the "
                "adapter"
            )
        revision = config.get("revision")
        if revision is not None and not isinstance(revision, str):
            self.problems.append(f"adapter_config.json: `revision` must be a commit or a branch, but is {revision!r}")
        if config and not config.get("peft_type"):
            self.problems.append("adapter_config.json does not say `peft_type`: save it with `save_pretrained`")
        self._weights({})
        if (self.folder / TOKENIZER_CONFIG).is_file() or (self.folder / "tokenizer.json").is_file():
            self._tokenizer(None)
        return {
            "auto_class": _auto_class_of_base(config),
            "base_model": base,
            "base_revision": revision,
            "grows_vocabulary": bool(config.get("trainable_token_indices")),
        }


def _auto_class_of_base(adapter: Mapping[str, Any]) -> str:
    mapping = adapter.get("auto_mapping")
    base_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    found = (name for name, reference in AUTO_MAP.items() if reference.partition(".")[2] == base_class)
    return next(found, "AutoModelForSeq2SeqLM")


def _bad_imports(tree: ast.Module) -> Iterator[str]:
    """Imports that work here, but not in the copy of the file that the library makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            if node.level > 1 or not node.module or "." in node.module:
                text = ast.unparse(node).partition(" import ")[0]
                yield f"has `{text} import`; the library copies files of the same folder only, for `from .file import`"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            if any(module.partition(".")[0] == "sparseq" for module in modules):
                yield "imports sparseq, which others may not have: import from the file beside it"


def _library_files(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The files that a tokenizer of one of the library's own classes is read from, where there is no tokenizer.json;
    none if the class is another, or one of them is missing."""
    tokenizer_class: Any = tokenizer_class_from_name(str(settings.get("tokenizer_class")))
    if tokenizer_class is None or not tokenizer_class.__module__.startswith("transformers.models."):
        return []
    unneeded = {"tokenizer_file", "tokenizer_config_file"}
    if not settings.get("separate_vocabs"):
        # Marian's, if the two languages have a vocabulary each.
        unneeded.add("target_vocab_file")
    files = [file for key, file in tokenizer_class.vocab_files_names.items() if key not in unneeded]
    return files if all((folder / file).is_file() for file in files) else []


def _token_ids(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from (number for number in vocabulary.values() if isinstance(number, int))
    elif isinstance(vocabulary, list):
        yield len(vocabulary) - 1
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token["id"]


def describe_contents(check: FolderCheck) -> list[str]:
    """The files as a table: what is uploaded with its size, what is left out and what is refused with the reason."""
    width = max((len(entry.path) for entry in check.entries), default=0)
    lines = []
    for fate, title in (("upload", "to upload"), ("leave out", "left out"), ("refuse", "refused")):
        entries = [entry for entry in check.entries if entry.fate == fate]
        if entries:
            count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
            lines.append(f"{title}: {count}, {format_size(sum(entry.size for entry in entries))}")
        lines += [f"  {entry.path:<{width}}  {format_size(entry.size):>7}  {entry.reason}" for entry in entries]
    return lines
