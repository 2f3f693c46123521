"""What is converted: a folder, or a repository of the Hub of which only the needed files are downloaded."""

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_cached_repo_tree, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import GenerationConfig, PreTrainedConfig

from sparseq.conversion.tensors import PICKLE, PICKLE_INDEX, check_no_adapter
from sparseq.hub.folder import CARD
from sparseq.hub.ids import is_hub_id
from sparseq.loading import GENERATION_CONFIG, INDEX, WHOLE, first_line, read_json
from sparseq.model_folder import TOKENIZER_FILES
from sparseq.modeling_sparseq import DEFAULT_MAX_LENGTH

LEGAL_FILES = ("LICENSE*", "NOTICE*")
"""What a model's license asks to be kept with a copy, changed or not."""

_CONFIG = "config.json"
# The forms that weights have, the first that is there is read: safetensors before pickles, as `Source` does.
_WEIGHTS = (
    (WHOLE,),
    (INDEX, "model-*-of-*.safetensors"),
    (PICKLE,),
    (PICKLE_INDEX, "pytorch_model-*-of-*.bin"),
)
# Fields of both configurations that tell a model what to return, or who wrote them.
_NO_SETTINGS = {"output_attentions", "output_hidden_states", "use_cache", "transformers_version", "_from_model_config"}
# Settings that are whole numbers, with the least that each may be, and those that are any numbers.
_LEAST = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "max_length", "max_new_tokens"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}
_NUMBERS = {
    *("length_penalty", "repetition_penalty", "encoder_repetition_penalty", "diversity_penalty", "guidance_scale"),
    *("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
}
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# What the client raises where there is no answer. Its HTTP package is no dependency of ours, so it is named by this.
_NO_ANSWER: type[Exception] = HfHubHTTPError.__bases__[0]


def local_folder(source: str, *, revision: str | None = None, accept: Callable[[Path], None]) -> Path:
    """The folder with the checkpoint `source`.

    Args:
        source: A folder, or the id of a repository of the Hub. Of that, configuration, tokenizer, license, card and
            one form of the weights are downloaded into the cache of the Hub's client, if they are not there already.
        revision: Branch, tag or commit of a repository.
        accept: Is given the folder with config.json and generation_config.json before weights are downloaded, and
            raises if they are not wanted.

    Raises:
        FileNotFoundError: There is no such folder, or it has no config.json.
        OSError: The repository cannot be read; the message says why and what to do.
        ValueError: `revision` is given for a folder, or the repository lacks config.json or weights; or as
            `check_no_adapter`.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision} is for repositories of the Hub, but {source} is a folder.")
        check_no_adapter(source, [file.name for file in path.glob("*.json")])
        if not (path / _CONFIG).is_file():
            raise FileNotFoundError(f"{source} has no {_CONFIG}, so it holds no model.")
        accept(path)
        return path
    if path.exists():
        raise ValueError(f"{source} is a file: name the folder of a model, or a repository of the Hub.")
    if not is_hub_id(source, may_lack_owner=True):
        raise FileNotFoundError(f"There is no folder {source}, and no repository of the Hub can have this name.")
    return _download(source, revision, accept)


def read_generation_config(folder: Path, config: PreTrainedConfig) -> tuple[GenerationConfig, list[str]]:
    """How a checkpoint generates, and what a user should know about that.

    Older checkpoints have their settings in config.json, where this version of the library no longer looks.

    Args:
        folder: The checkpoint.
        config: What its config.json says.

    Returns:
        The settings, with special tokens and a maximum length, and notes.

    Raises:
        ValueError: generation_config.json is damaged, or a setting has a value that it cannot have.
    """
    path = folder / (GENERATION_CONFIG if (folder / GENERATION_CONFIG).is_file() else _CONFIG)
    values = read_json(path)
    if path.name == GENERATION_CONFIG:
        # A mark of settings that the library may make anew from config.json, which no longer has them.
        values.pop("_from_model_config", None)
    else:
        # What config.json leaves to the defaults of its class counts too; of both, only what is about generation.
        names = GenerationConfig().to_dict().keys() - _NO_SETTINGS
        values = {name: value for name, value in {**config.to_dict(), **values}.items() if name in names}
    try:
        values = {name: value for name, value in values.items() if value is not None}
        check_numbers(values)
        settings = GenerationConfig(**values)
        notes = _drop_idle(settings) + _drop_unknown_words(settings, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"The generation settings in {path} are not valid: {first_line(error)}") from error
    for name in _SPECIAL_TOKENS:
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(config, name, None))
    if settings.max_length is None and settings.max_new_tokens is None:
        settings.max_length = min(DEFAULT_MAX_LENGTH, getattr(config, "max_position_embeddings", DEFAULT_MAX_LENGTH))
        notes.append(
            f"The source sets no maximum length, so generate() would stop at 20 tokens: `max_length` is "
            f"{settings.max_length} now."
        )
    return settings, notes


def check_numbers(values: Mapping[str, Any]) -> None:
    """Check settings of generate() that are numbers, and the forbidden words.

    Raises:
        ValueError: One has a value that it cannot have.
    """
    for name in values.keys() & _LEAST.keys():
        if type(values[name]) is not int or values[name] < _LEAST[name]:
            raise ValueError(f"`{name}` must be a whole number from {_LEAST[name]} on, but is {values[name]!r}.")
    for name in values.keys() & _NUMBERS:
        if type(values[name]) not in (int, float) or not math.isfinite(values[name]):
            raise ValueError(f"`{name}` must be a number, but is {values[name]!r}.")
    words = values.get("bad_words_ids", [])
    if not isinstance(words, list) or not all(isinstance(word, list) for word in words):
        raise ValueError(f"`bad_words_ids` must be a list of lists of tokens, but is {words!r}.")


def idle_settings(settings: GenerationConfig) -> list[str]:
    """The names of settings that do nothing beside the others, such as `early_stopping` with one beam.

    Raises:
        ValueError: A setting has a value that it cannot have.
    """
    try:
        settings.validate(strict=True)
    except ValueError as error:
        idle = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        if not idle:
            raise
        return idle
    return []


def needed_files(names: Collection[str]) -> list[str]:
    """Which files of a repository a conversion needs: not the weights of other frameworks, nor those in other forms.

    Args:
        names: All of its files.

    Raises:
        ValueError: It has no weights in a form that can be read.
    """
    weights = next((form for form in _WEIGHTS if form[0] in names), None)
    if weights is None:
        others = sorted(name for name in names if name.endswith((".h5", ".msgpack", ".ot", ".onnx", ".safetensors")))
        has = f"; it has {', '.join(others[:3])}" if others else ""
        raise ValueError(f"The repository has none of {', '.join(form[0] for form in _WEIGHTS)}{has}.")
    patterns = (_CONFIG, GENERATION_CONFIG, CARD, *TOKENIZER_FILES, *LEGAL_FILES, *weights)
    return sorted(
        name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _drop_unknown_words(settings: GenerationConfig, vocab_size: int) -> list[str]:
    """Take away forbidden words that no model of this vocabulary can write, for which generate() would stop."""
    words = settings.bad_words_ids or []
    known = [word for word in words if all(token < vocab_size for token in word)]
    if len(known) == len(words):
        return []
    settings.bad_words_ids = known or None
    beyond = [word for word in words if word not in known]
    return [
        f"`bad_words_ids` forbids {beyond}, which is beyond the vocabulary of {vocab_size}: it is not carried over, "
        "since generate() would stop at it."
    ]


def _drop_idle(settings: GenerationConfig) -> list[str]:
    """Take away settings that do nothing beside the others, with which the library saves none at all."""
    idle = idle_settings(settings)
    notes = [
        f"`{name}` ({getattr(settings, name)!r}) is not carried over: beside the other generation settings it "
        "does nothing, and the library does not save what does nothing."
        for name in idle
    ]
    for name in idle:
        setattr(settings, name, None)
    return notes


def _download(name: str, revision: str | None, accept: Callable[[Path], None]) -> Path:
    with _explained(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[_CONFIG, GENERATION_CONFIG]))
    # The folder bears the commit's name: what comes now is of the same commit, even if somebody pushes meanwhile.
    commit = folder.name
    try:
        names = [file.path for file in get_cached_repo_tree(name, revision=commit)]
    except CachedRepoTreeNotFoundError:
        # Downloaded by an older client, and the Hub cannot be asked: what is there is all there is.
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    check_no_adapter(name, names)
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{name} has no {_CONFIG}, so it holds no model of transformers.")
    accept(folder)
    with _explained(name, revision):
        return Path(snapshot_download(name, revision=commit, allow_patterns=needed_files(names)))


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the client raises into one line that says what to do."""
    try:
        yield
    except (_NO_ANSWER, LocalEntryNotFoundError) as error:
        raise OSError(_explain(error, name, revision)) from error


def _explain(error: Exception, name: str, revision: str | None) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        if is_offline_mode():
            return (
                f"There is no folder {name}, and the repository is not complete in the cache. HF_HUB_OFFLINE is set, "
                "so it cannot be downloaded: unset it, and give the same command again."
            )
        # The client wraps whatever kept it from the Hub.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its conditions on {constants.ENDPOINT}/{name}, and log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no folder {name}, and no such repository on the Hub that you may see: check the name, or log "
            "in as somebody who may with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision}."
    if isinstance(error, HfHubHTTPError):
        said = f"{error.response.status_code}: {error.server_message or first_line(error)}"
        return f"The Hub does not give {name} ({said}): try again later; what has arrived is not downloaded twice."
    return (
        f"There is no folder {name}, and no connection to {constants.ENDPOINT} to look for a repository of that name "
        f"({first_line(error)}): check the network, and try again."
    )
