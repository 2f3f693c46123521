"""A Sparseq model as one of the library's own architectures, which needs no code of ours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparseq.conversion.convert import plan_export
from sparseq.conversion.exporting import Checkpoint
from sparseq.conversion.plan import Plan
from sparseq.conversion.tensors import MAX_SHARD_SIZE, Source


@dataclass(frozen=True)
class LibraryExport:
    """As `exporting.Export`."""

    plan: Plan
    max_shard_size: int | str = MAX_SHARD_SIZE
    readme: str = ""

    @classmethod
    def prepared(
        cls, checkpoint: Checkpoint, *, to: str, dtype: str | None, max_shard_size: int | str | None
    ) -> "LibraryExport":
        """
        Args:
            checkpoint: A Sparseq model.
            to: The model type to make it into.
            dtype: Name of a data type for the weights; None keeps theirs.
            max_shard_size: As `write_weights` of `tensors`; None for its default.

        Raises:
            ValueError: The architecture cannot represent it; the message names what is in the way.
        """
        plan = plan_export(
            Source(checkpoint.folder),
            checkpoint.config,
            checkpoint.generation_config,
            to,
            dtype=getattr(torch, dtype) if dtype else None,
        )
        plan.check()
        return cls(replace(plan, notes=[*plan.notes, *checkpoint.notes]), max_shard_size or MAX_SHARD_SIZE)

    def report(self) -> Iterable[str]:
        return self.plan.report()

    def account(self) -> Mapping[str, Any]:
        return self.plan.account()

    def write_settings(self, folder: Path) -> None:
        self.plan.write_settings(folder)

    def write_weights(self, folder: Path) -> None:
        self.plan.write_weights(folder, max_shard_size=self.max_shard_size)
