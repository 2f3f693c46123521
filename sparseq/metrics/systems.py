"""Systems that commands translate with and compare: models, and files that hold translations already."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils.logging import disable_progress_bar

from sparseq.data.lines import read_lines
from sparseq.languages import Cue, Direction, language_ids
from sparseq.loading import check_model_files, load_config, load_model, load_tokenizer
from sparseq.training.evaluation import translate_batchwise


@dataclass(frozen=True)
class System:
    """A model, checked as far as that goes without loading its weights, or a file of translations.

    Attributes:
        name: As the user gave it: a folder, a Hub id or a file.
        tokenizer: The model's, which marks texts with the languages of the test set; None for a file.
        cue: What else tells the model into which language to translate.
        translations: The file's lines; None for a model.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    cue: Cue = field(default_factory=Cue)
    translations: list[str] | None = None

    def load(self, **options: Any) -> PreTrainedModel:
        """The model.

        Args:
            options: Of `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: As `load_model`.
        """
        # Of the weights, which load in a moment; translating has its own.
        disable_progress_bar()
        return load_model(AutoModelForSeq2SeqLM, self.name, **options)

    def source_limit(self, asked: int | None = None) -> int | None:
        """To how many tokens sources are cut: as asked, else as the tokenizer says; None for no limit."""
        assert self.tokenizer is not None
        if asked is None and self.tokenizer.model_max_length < LARGE_INTEGER:
            return self.tokenizer.model_max_length
        return asked

    def translate(
        self,
        sources: Sequence[str],
        *,
        batch_tokens: int,
        max_source_length: int | None = None,
        model: PreTrainedModel | None = None,
        **options: Any,
    ) -> list[str]:
        """What the model makes of `sources`.

        Args:
            sources: Plain text.
            batch_tokens: Source tokens of a batch.
            max_source_length: Longer sources are cut to that many tokens. None: as the tokenizer says.
            model: What `load` gave, where that is in memory already.
            options: Of generate().
        """
        if self.translations is not None:
            return self.translations
        assert self.tokenizer is not None
        return translate_batchwise(
            model or self.load(),
            self.tokenizer,
            sources,
            prefix=self.cue.prefix,
            batch_tokens=batch_tokens,
            max_source_length=self.source_limit(max_source_length),
            progress=True,
            **self.cue.generation,
            **options,
        )


def open_system(name: str, direction: Direction, *, lines: int) -> System:
    """A model or a file of translations, with everything checked that can be checked before a model is loaded.

    Args:
        name: Folder or Hub id of a sequence-to-sequence model, or a file with one translation a line (or .gz).
        direction: The languages of the test set.
        lines: How many translations the test set needs.

    Raises:
        FileNotFoundError: `name` can only be a path, and nothing is there.
        ValueError: The file has another number of lines; or the folder or Hub id holds no sequence-to-sequence model
            with a tokenizer and weights in safetensors, or files of it are damaged; or its tokenizer has language
            codes, but not for these languages.
    """
    path = Path(name)
    if path.is_file():
        translations = list(read_lines(path))
        if len(translations) != lines:
            raise ValueError(
                f"{name} has {len(translations):,} lines, but the test set has {lines:,}: line i must translate "
                "sentence i. An empty translation is an empty line."
            )
        return System(name, translations=translations)
    return open_model(name, direction)


def open_model(name: str, direction: Direction) -> System:
    """A model, with everything checked that can be checked before it is loaded.

    Args:
        name: Folder or Hub id of a sequence-to-sequence model.
        direction: The languages of the text.

    Raises:
        FileNotFoundError, ValueError: As `open_system`.
    """
    path = Path(name)
    if path.is_dir():
        _check_folder(path)
    elif _is_path(name):
        raise FileNotFoundError(_nothing_at(path))
    if not (path / "adapter_config.json").is_file():
        load_seq2seq_config(name)
    tokenizer = load_tokenizer(name)
    return System(name, tokenizer, direction.set_up(tokenizer, name))


def check_codes(direction: Direction, systems: Sequence[System]) -> None:
    """Refuse codes of languages that no model is told of.

    Raises:
        ValueError: There are such codes.
    """
    has_codes = any(one.tokenizer is not None and language_ids(one.tokenizer) for one in systems)
    has_tags = any(one.cue.prefix for one in systems)
    for option, codes, is_told in (
        ("--source-code", direction.source_codes, has_codes),
        ("--target-code", direction.target_codes, has_codes or has_tags),
    ):
        if codes and not is_told:
            raise ValueError(f"{option} {' '.join(codes)} has no effect: there is no model that is told a language.")


def load_seq2seq_config(name: str | Path) -> Any:
    """The configuration of a sequence-to-sequence model in a folder or on the Hub.

    Raises:
        ValueError: As `load_config`, or it is a model of another kind.
    """
    config = load_config(name)
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is a model of type {config.model_type!r}, which is not sequence-to-sequence.")
    return config


def _is_path(name: str) -> bool:
    """Whether a name under which nothing exists cannot be a Hub id, or is surely not meant as one."""
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(path.parts) > 2:
        return True
    # "outputs/tiny" could be a Hub id; where there is a folder "outputs" it is a slip of the pen.
    return len(path.parts) == 2 and path.parent.is_dir()


def _nothing_at(path: Path) -> str:
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    listing = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"There is no folder or file {path}. {parent} holds: {listing or 'nothing'}."


def _check_folder(folder: Path) -> None:
    # An adapter has its base model's name in place of a configuration.
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = sorted({path.parent.relative_to(folder) for path in folder.glob("**/config.json")})[:5]
        hint = f" Models are in its {', '.join(map(str, inside))}." if inside else ""
        raise ValueError(f"{folder} has no config.json, so it is no model's folder.{hint}")
    try:
        check_model_files(folder, may_be_int8=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has a configuration but no weights (model.safetensors, or shards with an index)."
        ) from error
