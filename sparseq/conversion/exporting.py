"""What the targets of `sparseq export` have in common: a checkpoint to begin with, and what is made of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig, PreTrainedTokenizerBase

from sparseq.configuration_sparseq import SparseqConfig
from sparseq.conversion.sources import read_generation_config
from sparseq.conversion.tokenizers import has_tokenizer, read_tokenizer
from sparseq.loading import check_model_files, load_config
from sparseq.modeling_sparseq import SparseqForConditionalGeneration


@dataclass(frozen=True)
class Checkpoint:
    """A Sparseq model to be exported, checked as far as that goes without reading weights.

    Attributes:
        folder: Where it lies.
        config: Its configuration.
        generation_config: How it generates.
        notes: What a user should know of these settings, in sentences.
    """

    folder: Path
    config: SparseqConfig
    generation_config: GenerationConfig
    notes: Sequence[str]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """
        Raises:
            FileNotFoundError: There is no such folder, or it has no weights.
            ValueError: It is no sound Sparseq model.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
        config = load_config(folder)
        if config.model_type != "sparseq":
            raise ValueError(f"{folder} is no Sparseq model: its model type is {config.model_type!r}.")
        check_model_files(folder)
        settings, notes = read_generation_config(folder, config)
        return cls(folder, config, settings, notes)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer; None where there is none."""
        return read_tokenizer(self.folder) if has_tokenizer(self.folder) else None


class Export(Protocol):
    """A model that can be written in another form; everything that may be in the way has been checked."""

    @property
    def readme(self) -> str:
        """What README.md says of how to run it; empty where the library knows how."""

    def report(self) -> Iterable[str]:
        """What becomes of the model, in lines for people."""

    def account(self) -> Mapping[str, Any]:
        """The same as plain values, for the record."""

    def write_settings(self, folder: Path) -> None:
        """Write what a tokenizer is loaded beside."""

    def write_weights(self, folder: Path) -> None:
        """Write all the rest.

        Raises:
            OSError, ValueError: The disk is full, or a weight cannot be stored.
        """


@dataclass(frozen=True)
class ProgramExport(ABC):
    """An `Export` of programs that compute what the model does, and that our settings of generation lie beside.

    Attributes:
        checkpoint: What is exported.
        model: The same, loaded.
    """

    checkpoint: Checkpoint
    model: SparseqForConditionalGeneration

    @abstractmethod
    def report(self) -> Iterable[str]:
        """As `Export.report`."""

    def account(self) -> Mapping[str, Any]:
        return {"source": str(self.checkpoint.folder), "notes": list(self.report())}

    def write_settings(self, folder: Path) -> None:
        self.checkpoint.generation_config.save_pretrained(folder)
