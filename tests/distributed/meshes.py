"""What four processes do with a model that is cut in two ways at once, or in four parts."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tests.distributed.plans import cut_model, observe

# Fields of `DistributedConfig`, and which half of the sentences each process has: all of them where it is None.
MESHES: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "tensors by shards": ({"tp_size": 2, "fsdp_size": 2}, (0, 0, 1, 1)),
    "tensors by shards, pairs of experts": ({"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, (0, 0, 1, 1)),
    "tensors by shards, single experts": ({"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, (0, 0, 1, 1)),
    "copies of shards": ({"dp_replicate_size": 2, "fsdp_size": 2}, (0, 1, 0, 1)),
    "quarters of tensors": ({"tp_size": 4}, (None,) * 4),
    "quarters of tensors, single experts": ({"tp_size": 4, "ep_size": 4}, (None,) * 4),
}
MODEL = "sparse wide"


def run_all(folder: Path, rank: int) -> None:
    """Cut the model in each way; `{mesh}.{rank}.pt` in `folder` holds what this process found."""
    torch.set_num_threads(1)
    PartialState(cpu=True)
    plans = {name: fields for name, (fields, _) in MESHES.items()}
    for name, (_, shares) in MESHES.items():
        model = cut_model(folder / name, name, MODEL, plans=plans)
        torch.save(observe(model, folder / name, share=shares[rank]), folder / f"{name}.{rank}.pt")
