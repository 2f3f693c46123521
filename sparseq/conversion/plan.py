"""From a plan to a model's folder: what is made of what, checked before anything is written, and told afterwards."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sparseq import __version__
from sparseq.conversion.tensors import (
    MAX_SHARD_SIZE,
    LeftOut,
    Planned,
    Source,
    check_plan,
    needed_tensors,
    write_weights,
)
from sparseq.modeling_sparseq import AUTO_MAP, copy_code

RECORD = "conversion.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model becomes another one.

    Attributes:
        source: The tensors that there are.
        model_class: Class of the new model.
        config: Its configuration.
        generation_config: How it generates.
        planned: Its tensors.
        left_out: Tensors of the source that it does without.
        notes: What a user should know about the result, in sentences.
    """

    source: Source
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    generation_config: GenerationConfig
    planned: Sequence[Planned]
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = field(default_factory=list)

    def check(self) -> None:
        """
        Raises:
            ValueError: As `check_plan`.
        """
        check_plan(self.source, self.planned, self.left_out, needed_tensors(self.model_class, self.config))

    def write(self, folder: Path, *, command: str, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write the whole model and its record; `check` comes before.

        Args:
            folder: An empty folder.
            command: As `write_record`.
            max_shard_size: As `write_weights`.

        Raises:
            ValueError, OSError: As `write_weights`.
        """
        self.write_settings(folder)
        self.write_weights(folder, max_shard_size=max_shard_size)
        self.write_record(folder, command=command)

    def write_settings(self, folder: Path) -> None:
        """Write all that is no weight: the configuration, the code, and how the model generates."""
        config = copy.deepcopy(self.config)
        config.architectures = [self.model_class.__name__]
        config.dtype = self.dtype
        if config.model_type == "sparseq":
            config.auto_map = dict(AUTO_MAP)
            copy_code(folder)
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def write_weights(self, folder: Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write the weights; arguments and errors as of `tensors.write_weights`."""
        write_weights(self.source, self.planned, folder, max_shard_size=max_shard_size)

    def write_record(self, folder: Path, *, command: str, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write conversion.json.

        Args:
            folder: Where to.
            command: What makes the model: "sparseq convert".
            facts: What else is known of it, as plain values.
        """
        write_record(folder, command=command, facts={**facts, **self.account()})

    @property
    def is_exact(self) -> bool:
        """Whether every number of the source is what it was, and none was computed to another precision."""
        specs = self.source.specs
        is_rounded = any(specs[name].dtype != one.spec.dtype for one in self.planned for name in one.sources)
        return not is_rounded and all(one.is_exact for one in self.left_out)

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the weights."""
        sizes: dict[torch.dtype, int] = {}
        for one in self.planned:
            sizes[one.spec.dtype] = sizes.get(one.spec.dtype, 0) + one.spec.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def account(self) -> dict[str, Any]:
        """What becomes of every tensor of the source and what every new one is made of, as plain values."""
        return {
            "source": str(self.source.folder),
            "tensors": [{"name": one.name, "from": list(one.sources), "how": one.how} for one in self.planned],
            "left_out": [{"name": one.name, "reason": one.reason} for one in self.left_out],
            "notes": list(self.notes),
        }

    def report(self) -> Iterator[str]:
        """The account for people: alike tensors of all layers in one line, the numbers in their names as "*"."""
        made = [(_pattern(", ".join(one.sources)) or "nothing", _pattern(one.name), one.how) for one in self.planned]
        for (origin, name, how), same in groupby(sorted(made)):
            yield f"{_times(same)} {name if origin == name else f'{origin} -> {name}'}: {how}"
        lost = [(_pattern(one.name), one.reason) for one in self.left_out]
        for (name, reason), left in groupby(sorted(lost)):
            yield f"{_times(left)} {name} -> left out: {reason}"
        total = len(self.source.specs)
        yield f"{total} tensors read, {len(self.left_out)} of them left out, {len(self.planned)} written."
        yield from self.notes


def write_record(folder: Path, *, command: str, facts: Mapping[str, Any]) -> None:
    """Write conversion.json: the command that makes what is in a folder, our version, and what else is known of it."""
    record = {"command": command, "sparseq": __version__, **facts}
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pattern(name: str) -> str:
    starred = re.sub(r"(?<=[._])\d+(?=[._,]|$)", "*", name)
    # The experts of one layer, which a stacked tensor is made of.
    return ", ".join(dict.fromkeys(starred.split(", "))) if starred else ""


def _times(same: Iterator[Any]) -> str:
    return f"{sum(1 for _ in same):4d} x"
