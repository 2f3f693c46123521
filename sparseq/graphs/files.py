"""A model's graphs as a folder of files that any program with ONNX Runtime can run."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import onnx

from ..configuration_sparseq import SPARSEQ_VERSION
from ..loading import read_json, tensor_files
from ..model_folder import new_folder
from ..modeling_sparseq import SparseqForConditionalGeneration
from .int8 import Int8Operators
from .models import ModelGraphs
from .nodes import WeightFile
from .operators import FloatOperators, Operators

# What the files mean. Raised when inputs, outputs or the record change, so that an earlier folder is not taken for one
# of this version.
GRAPH_FORMAT = 3
_RECORD = "graphs.json"
_WEIGHTS = "weights.bin"

# Of a saved configuration, what says nothing of the model.
_VOLATILE = ("_name_or_path", "auto_map", "sparseq_version", "transformers_version")

Precision = Literal["float32", "int8"]
_OPERATORS: dict[str, type[Operators]] = {"float32": FloatOperators, "int8": Int8Operators}


def export_graphs(
    model: SparseqForConditionalGeneration, folder: str | Path, *, precision: Precision = "float32"
) -> None:
    """Write a model as ONNX graphs for ONNX Runtime.

    The folder gets `encoder.onnx`, `prefill.onnx`, `step.onnx`, `step_attention.onnx` (the step that also gives
    cross-attention) and `likeliest.onnx`, whose inputs and outputs `ModelGraphs` describes; their weights, each stored
    once, in `weights.bin`; and `graphs.json`, which names precision, configuration, inputs, outputs and sizes.

    Args:
        model: The model, of any type; its weights are taken in float32.
        folder: The folder to be; it appears when it is complete.
        precision: "float32", or "int8" for linear layers, experts and embeddings in 8 bits.

    Raises:
        FileExistsError: The folder is there already.
        ValueError: There is no such precision, or the model has something that no graph can express.
    """
    if precision not in _OPERATORS:
        raise ValueError(f"`precision` must be one of {sorted(_OPERATORS)}, but is {precision!r}")
    with new_folder(folder) as partial:
        weights = WeightFile(partial / _WEIGHTS)
        graphs = ModelGraphs(model, weights, _OPERATORS[precision]())
        written = {
            "encoder": graphs.encoder(),
            "prefill": graphs.prefill(),
            "step": graphs.step(),
            "step_attention": graphs.step(gives_attention=True),
            "likeliest": graphs.likeliest(),
        }
        weights.close()
        for name, graph in written.items():
            onnx.save(graph.model(), partial / f"{name}.onnx")
        config = json.loads(model.config.to_json_string(use_diff=False))
        # A path of this machine, where the model comes from a folder.
        config.pop("_name_or_path", None)
        record = {
            "format": GRAPH_FORMAT,
            "sparseq_version": SPARSEQ_VERSION,
            "precision": precision,
            "graphs": {
                name: {"file": f"{name}.onnx", "inputs": graph.inputs, "outputs": graph.outputs}
                for name, graph in written.items()
            },
            "config": config,
            # By which files that are cut off are found before they are needed.
            "bytes": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
        }
        (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `export_graphs` says of its files.

    Raises:
        FileNotFoundError: The folder holds no graphs, or not all of them.
        ValueError: They are in another format, or a file is damaged.
    """
    path = Path(folder) / _RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {_RECORD}: export a model into it with `export_graphs()`.")
    record = read_json(path)
    if record["format"] != GRAPH_FORMAT:
        raise ValueError(
            f"{path} is in format {record['format']}, but this version of Sparseq reads format {GRAPH_FORMAT}: export "
            "the model anew."
        )
    for name, size in record["bytes"].items():
        found = path.with_name(name).stat().st_size
        if found != size:
            raise ValueError(f"{path.with_name(name)} has {found:,} bytes, but was written with {size:,}")
    return record


def graph_folder_name(checkpoint: str | Path, precision: Precision) -> str:
    """The name under which graphs of a checkpoint are kept: another one for other weights, configuration or format.

    Args:
        checkpoint: A model's folder. Its files count by what they hold, not by their dates.
        precision: As for `export_graphs`.

    Raises:
        FileNotFoundError: The folder holds no configuration or no weights.
        ValueError: A file of it is damaged, or its weights are not in safetensors.
    """
    checkpoint = Path(checkpoint)
    config = read_json(checkpoint / "config.json")
    kept = {name: value for name, value in config.items() if name not in _VOLATILE}
    digest = hashlib.sha256(json.dumps([GRAPH_FORMAT, kept], sort_keys=True).encode())
    for path in sorted(set(tensor_files(checkpoint).values())):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"onnx-{precision}-{digest.hexdigest()[:16]}"
