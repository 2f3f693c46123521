"""Loading models that others have made: no code of theirs, no pickles, and nothing damaged or missing goes unnoticed.

transformers is lenient where a command must not be: weights that are missing are drawn at random, weights too many are
ignored, an unreadable generation_config.json counts as none, and each time a line in the log is all there is of it.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparseq.modeling_sparseq import SparseqEncoderModel, SparseqForConditionalGeneration, SparseqModel
from sparseq.quantization_sparseq import INT8_METHOD, use_int8_modules

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
MODEL_CLASSES = {kind.__name__: kind for kind in (SparseqForConditionalGeneration, SparseqModel, SparseqEncoderModel)}
"""The classes of Sparseq models, by the names that `architectures` has for them."""

_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
# The head of a sequence-to-sequence model, which the model inside it leaves out.
_HEAD = ("lm_head.", "final_logits_bias")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a model's folder holds.

    Raises:
        ValueError: It is no JSON, or something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): was its saving cut short?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """Name of each tensor of a model or adapter to the file in `folder` that holds it; headers are read, no weights.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: They are in pickles, a file is damaged or cut short, or the index of shards is broken, names a file
            that is not there, does not agree with its files, or leads out of the folder.
    """
    folder = Path(folder)
    for name in (ADAPTER,) if is_adapter(folder) else (WHOLE, INDEX, ADAPTER):
        if (folder / name).is_file():
            return _shards(folder) if name == INDEX else dict.fromkeys(_tensors(folder / name), folder / name)
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has its weights in {', '.join(pickles[:3])}: pickles, which can do more than hold weights. "
            "Only safetensors are read: load the model where you trust it, and save it again with `save_pretrained`."
        )
    raise FileNotFoundError(f"{folder} has none of {WHOLE}, {INDEX} and {ADAPTER}.")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of PEFT rather than a model."""
    return Path(folder, "adapter_config.json").is_file() and not Path(folder, "config.json").is_file()


def load_config(name: str | Path) -> Any:
    """The configuration of a model in a folder or on the Hub.

    Raises:
        ValueError: There is none, it cannot be read, contradicts itself, was written by a newer Sparseq, or needs code
            that came with the model.
    """
    path = Path(name) / "config.json"
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
        raise ValueError(
            f"There is no folder or file {name}, and no model of that name could be read from the Hub: "
            f"{first_line(error)}"
        ) from error
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not valid: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error) and "Sparseq" not in str(error):
            raise ValueError(
                f"{name} needs code that came with it, and no command of sparseq runs such code. Load it in a program "
                "of your own if you trust it."
            ) from error
        raise


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model in a folder or on the Hub.

    Raises:
        ValueError: There is none, or its files cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ImportError:
        raise
    # tokenizers raises nothing more precise.
    except Exception as error:
        broken = f"{Path(name) / 'tokenizer.json'}: " if (Path(name) / "tokenizer.json").is_file() else ""
        raise ValueError(
            f"{name} has no tokenizer that can be loaded ({broken}{first_line(error)}). Save it beside the weights: "
            f"tokenizer.save_pretrained({str(name)!r})."
        ) from error
    return tokenizer


def load_model(
    auto_class: Any, name: str | Path, *, may_lack: Collection[str] = (), **options: Any
) -> PreTrainedModel:
    """A model in a folder or on the Hub, all of whose weights were there.

    Args:
        auto_class: An auto class of transformers.
        name: Folder or Hub id.
        may_lack: Last parts of the names of weights that may be missing.
        options: Further arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: A folder has no weights.
        ValueError: As `check_model_files`; or weights are missing, too many, of another shape or not finite.
    """
    if Path(name).is_dir():
        check_model_files(name, may_be_int8=True)
    try:
        model, report = auto_class.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"The weights in {name}, or their index, cannot be read ({error}): was their saving cut short?"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"The weights in {name} do not fit its config.json: their shapes differ.") from error
    if not Path(name).is_dir():
        # What was downloaded with the weights: of a folder it was read before them.
        commit = getattr(model.config, "_commit_hash", None)
        downloaded = try_to_load_from_cache(str(name), GENERATION_CONFIG, revision=commit)
        if isinstance(downloaded, str):
            read_json(Path(downloaded))
    lacking = [key for key in report["missing_keys"] if key.rpartition(".")[2] not in may_lack]
    # Other architectures have stored what they no longer use.
    spare = report["unexpected_keys"] if model.config.model_type == "sparseq" else ()
    spare = [key for key in spare if not key.startswith(_HEAD)]
    _refuse(name, lacking, spare)
    if broken := [key for key, tensor in model.state_dict().items() if not is_finite(tensor)]:
        raise ValueError(f"The weights in {name} are not all finite numbers: {some_of(broken)}.")
    return model


def check_model_files(folder: str | Path, *, may_be_int8: bool = False) -> None:
    """Check the folder of a model or an adapter as far as that goes without reading weights: the files are whole, and
    the weights are those of the configuration. With an adapter its base model is checked, where that is a folder.

    Args:
        folder: The folder.
        may_be_int8: Accept int8 weights, which can be run, but neither trained nor changed.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: As `check_weights`, or generation_config.json is damaged, or the weights are int8.
    """
    folder = Path(folder)
    _check_model(folder)
    if not may_be_int8 and (folder / "config.json").is_file() and _quantization(folder):
        raise ValueError(
            f"{folder} has int8 weights, which PyTorch can run and nothing can change: name the folder with the "
            "floating-point weights that they were made from."
        )
    if not (folder / "adapter_config.json").is_file():
        return
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_dir():
        try:
            _check_model(Path(base))
        except FileNotFoundError as error:
            raise ValueError(f"The base model of the adapter {folder} is incomplete: {error}") from error


def check_weights(folder: str | Path) -> dict[str, Path]:
    """Check that the weights in a folder are whole and, of a Sparseq model, that they are those of its configuration,
    by name and shape; headers are read, no weights.

    Returns:
        As `tensor_files`.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: As `tensor_files` and `load_config`, or the weights do not fit or are quantized in a way that is
            not Sparseq's.
    """
    folder = Path(folder)
    files = tensor_files(folder)
    # An adapter has no configuration of the model.
    if not (folder / "config.json").is_file() or (config := load_config(folder)).model_type != "sparseq":
        return files
    kind = MODEL_CLASSES.get((config.architectures or [""])[0], SparseqForConditionalGeneration)
    layers = config.encoder_layers + (0 if kind is SparseqEncoderModel else config.decoder_layers)
    if layers > len(files):
        # A model of that many layers is not made to find that out.
        raise ValueError(f"{folder / 'config.json'} asks for {layers} layers, but there are {len(files)} weights.")
    method = _quantization(folder)
    if method not in (None, INT8_METHOD):
        raise ValueError(
            f"{folder} is quantized with {method!r}, whose files are not known here: name the folder with the "
            "floating-point weights that it was made from."
        )
    with torch.device("meta"):
        model = kind(config)
        if method:
            use_int8_modules(model)
    wanted, tied = model.state_dict(), model.all_tied_weights_keys
    # What is tied to another weight is not stored, or is the same.
    _refuse(folder, wanted.keys() - tied.keys() - files.keys(), files.keys() - wanted.keys())
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key, place in files.items() if place == path}
        for key, shape in shapes.items():
            if shape != tuple(wanted[key].shape):
                raise ValueError(
                    f"{path} does not fit the config.json beside it: {key} is {shape}, but must be "
                    f"{tuple(wanted[key].shape)}."
                )
    return files


def _quantization(folder: Path) -> str | None:
    """How the weights of a model's folder are quantized, by config.json; None where they are floating point."""
    settings = read_json(folder / "config.json").get("quantization_config")
    return str(settings.get("quant_method")) if isinstance(settings, dict) else None


def _check_model(folder: Path) -> None:
    check_weights(folder)
    if (folder / GENERATION_CONFIG).is_file():
        read_json(folder / GENERATION_CONFIG)


def _shards(folder: Path) -> dict[str, Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no `weight_map`: was it changed?")
    for file in sorted({str(file) for file in weight_map.values()}):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {file!r}, which is no safetensors file of its folder.")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, which {INDEX} names: was a copy or a download cut short?")
        if odd := {key for key, place in weight_map.items() if place == file} ^ _tensors(folder / file):
            raise ValueError(f"{folder / file} and {INDEX} do not agree on {some_of(odd)}.")
    return {key: folder / file for key, file in weight_map.items()}


def _tensors(path: Path) -> set[str]:
    try:
        # Compares the header with the file's size.
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): was its saving cut short?") from error


def _refuse(name: str | Path, lacking: Collection[str], spare: Collection[str]) -> None:
    if lacking:
        raise ValueError(f"The weights in {name} do not fill the model: {some_of(lacking)} missing.")
    if spare:
        raise ValueError(f"The weights in {name} do not fit its config.json: it has no place for {some_of(spare)}.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite, found without memory of its size, which `isfinite` would take."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both are NaN if any number is.
    return all(one.isfinite() for one in tensor.aminmax())


def some_of(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_line(error: Exception) -> str:
    """The beginning of a message, or the kind of an error that has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
