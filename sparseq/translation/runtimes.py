"""Which backend a `Translator` decodes with, and the graphs that are kept beside a checkpoint."""

import importlib.util
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is there without `as`
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig
from transformers.utils.versions import require_version

from sparseq.loading import GENERATION_CONFIG, check_model_files, first_line, load_model
from sparseq.model_folder import GRAPH_FOLDER
from sparseq.translation.backend import Backend
from sparseq.translation.generate_backend import GenerateBackend, is_accelerator

Precision = Literal["float32", "int8"]
Runtime = Literal["auto", "onnx", "torch"]

INSTALL = 'pip install "sparseq[onnx]"'
# The first that has all operators of the graphs.
_ONNX_RUNTIME = "1.31"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """How a model is to be run.

    Attributes:
        precision: Of the weights.
        runtime: "onnx", "torch", or "auto" for what is there.
        device: Where; None for an accelerator if there is one, else the CPU.
        threads: Threads of one operator; None leaves it to the runtime.
        cache_dir: Where graphs are kept; None for beside the checkpoint.
    """

    precision: Precision = "float32"
    runtime: Runtime = "auto"
    device: str | torch.device | None = None
    threads: int | None = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: A value is none that there is.
        """
        for name, kinds in (("precision", Precision), ("runtime", Runtime)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(f'"{kind}"' for kind in get_args(kinds))
                raise ValueError(f"`{name}` must be one of {known}, but is {getattr(self, name)!r}.")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"`threads` must be a whole number from 1 on, but is {self.threads!r}.")
        if self.runtime == "onnx" and is_accelerator(self.target_device):
            raise ValueError(
                f'`runtime="onnx"` runs on the CPU, but `device` is {self.target_device}: give `device="cpu"`, or '
                '`runtime="torch"`.'
            )
        if not _is_there(self.target_device):
            raise _no_device(self.device)

    @property
    def target_device(self) -> torch.device:
        """Where the model is to run."""
        if self.device is not None:
            try:
                return torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise _no_device(self.device) from error
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found is not None and self.runtime != "onnx" else torch.device("cpu")


def _devices() -> list[torch.device]:
    """The devices of this machine."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    accelerators = (
        [] if found is None else [torch.device(found.type, i) for i in range(torch.accelerator.device_count())]
    )
    return [torch.device("cpu"), *accelerators]


def _is_there(device: torch.device) -> bool:
    # Without an index it is the first one, or the one that the process has chosen.
    return any(device.type == one.type and device.index in (None, one.index or 0) for one in _devices())


def _no_device(device: str | torch.device | None) -> ValueError:
    there = ", ".join(map(str, _devices()))
    return ValueError(f"`device` is {str(device)!r}, which PyTorch does not find on this machine: it has {there}.")


def open_backend(folder: Path, config: PreTrainedConfig, choice: Choice) -> tuple[Backend, GenerationConfig]:
    """The backend for the model in `folder`, and the generation settings of the model.

    With `runtime="auto"` it is ONNX Runtime on the CPU; where that cannot be, it is `generate()`, and a warning in the
    log says why.

    Raises:
        ModuleNotFoundError: `runtime="onnx"`, and onnx or onnxruntime is not installed.
        OSError: `runtime="onnx"`, and graphs can be kept nowhere.
        ValueError: The model cannot be run as asked; or as `load_model`.
    """
    if choice.runtime == "torch" or is_accelerator(choice.target_device):
        return _open_torch(folder, config, choice)
    try:
        return _open_onnx(folder, config, choice)
    except (ImportError, OSError, ValueError) as error:
        if choice.runtime == "onnx":
            raise
        _logger.warning(f"{folder} is run by PyTorch's generate(), which is slower than ONNX Runtime: {error}")
    return _open_torch(folder, config, choice)


def _open_torch(folder: Path, config: PreTrainedConfig, choice: Choice) -> tuple[Backend, GenerationConfig]:
    options: dict[str, Any] = {}
    if choice.precision == "int8" and getattr(config, "quantization_config", None) is None:
        if config.model_type != "sparseq":
            raise ValueError(
                f'{folder} is a model of type {config.model_type!r}, which has no `precision="int8"` here: make a '
                "Sparseq model of it with `sparseq convert`."
            )
        from sparseq.quantization_sparseq import SparseqInt8Config

        options["quantization_config"] = SparseqInt8Config()
    if choice.threads is not None:
        torch.set_num_threads(choice.threads)
    model: Any = load_model(AutoModelForSeq2SeqLM, folder, dtype=torch.float32, **options)
    model.to(choice.target_device)
    return GenerateBackend(model), model.generation_config


def _open_onnx(folder: Path, config: PreTrainedConfig, choice: Choice) -> tuple[Backend, GenerationConfig]:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"the package {package} is not installed: {INSTALL}.", name=package)
    # An earlier one would fail at the first step.
    require_version(f"onnxruntime>={_ONNX_RUNTIME}", hint=INSTALL)
    if config.model_type != "sparseq":
        raise ValueError(
            f"graphs are made of Sparseq models, and it is a model of type {config.model_type!r}: make a Sparseq "
            "model of it with `sparseq convert`."
        )
    # Graphs round the weights by themselves.
    check_model_files(folder)
    from sparseq.translation.onnx_engine import OnnxEngine
    from sparseq.translation.runtime_backend import RuntimeBackend

    graphs = prepare_graphs(folder, choice.precision, choice.cache_dir)
    try:
        engine = OnnxEngine(graphs, threads=choice.threads)
    except (OSError, ValueError) as error:
        _logger.warning(f"{graphs} is damaged, so its graphs are made anew: {error}")
        _remove(graphs)
        engine = OnnxEngine(prepare_graphs(folder, choice.precision, choice.cache_dir), threads=choice.threads)
    return RuntimeBackend(engine), _read_generation_config(folder, config)


def prepare_graphs(folder: Path, precision: Precision, cache_dir: str | Path | None = None) -> Path:
    """The folder with the graphs of a checkpoint, which are made if they are not there.

    They are kept beside the checkpoint, or in the user's cache where that cannot be written, or in `cache_dir`. Of
    several processes one makes them, and the others wait.

    Raises:
        ValueError: The model has something that no graph can express; or as `load_model`.
        OSError: They cannot be written.
    """
    from sparseq.graphs.files import export_graphs, graph_folder_name

    name = graph_folder_name(folder, precision)
    places = [Path(cache_dir)] if cache_dir is not None else [folder / GRAPH_FOLDER, *_user_cache()]
    found = next((place / name for place in places if (place / name).is_dir()), None)
    if found is not None:
        return found
    graphs = _writable(places) / name
    try:
        with WeakFileLock(graphs.with_name(f".{name}.lock")):
            if not graphs.is_dir():
                print(f"sparseq: making graphs for ONNX Runtime, once: {graphs}", file=sys.stderr)
                model = load_model(AutoModelForSeq2SeqLM, folder, dtype=torch.float32)
                export_graphs(model, graphs, precision=precision)  # type: ignore[arg-type]  # as config.json says
    except OSError as error:
        raise _no_place([graphs.parent], first_line(error)) from error
    return graphs


def _remove(graphs: Path) -> None:
    try:
        shutil.rmtree(graphs)
    except FileNotFoundError:
        # Another process did.
        return
    except OSError as error:
        raise OSError(f"{graphs} is damaged: remove it, and it is made again ({first_line(error)}).") from error


def _writable(places: list[Path]) -> Path:
    """The first of the folders that is there or can be made, and can be written.

    Raises:
        OSError: None of them.
    """
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise _no_place(places, "it cannot be written")


def _no_place(places: list[Path], reason: str) -> OSError:
    folders = " or ".join(map(str, places))
    return OSError(f"graphs cannot be kept in {folders} ({reason}): name another folder with `cache_dir`.")


def _user_cache() -> list[Path]:
    """The user's cache; nothing where the user has no home."""
    try:
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseq"]
    except RuntimeError:
        return []


def _read_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """As `from_pretrained` would give it to the model, without the model."""
    if (folder / GENERATION_CONFIG).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)
