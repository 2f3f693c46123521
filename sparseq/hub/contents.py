"""What each file of a model folder is to the Hub: uploaded, left out, or a reason not to upload anything.

Only what is known is uploaded. A file that nobody expects stops the push rather than being published or dropped
without a word.
"""

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from sparseq.hub.eval_results import FOLDER as EVAL_RESULTS
from sparseq.model_folder import GRAPH_FOLDER

Fate = Literal["upload", "leave out", "refuse"]

LARGEST = 100 * 2**20
"""Bytes that a file other than weights may have. The largest tokenizer.json of public models have about 35 MB."""

MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""The weights of a whole model. What an earlier one leaves of them would be loaded in place of a new one's."""

LEGAL = ("LICENSE*", "NOTICE*", "CITATION.cff")
"""What people write besides the model card, and would not want to lose."""

_WEIGHTS = "weights"
_TOKENIZER = "tokenizer"
_UPLOADED = (
    (("config.json",), "configuration"),
    (("generation_config.json",), "how it generates"),
    (("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors"), _WEIGHTS),
    (("model.safetensors.index.json",), "which shard has which weights"),
    (("adapter_config.json",), "configuration of the adapter"),
    (("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"), _TOKENIZER),
    (("vocab.json", "target_vocab.json", "vocab.txt", "merges.txt"), _TOKENIZER),
    (("*.model", "*.spm", "chat_template.jinja"), _TOKENIZER),
    (("README.md",), "model card"),
    (LEGAL, "license and citation"),
)
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")

# Who loads a model needs none of these, and some would do harm: pickles run code when they are read, records of a run
# name folders and files of this machine, text may not be ours to publish.
_STATE = "state of a training, to resume it with"
_RECORD = "record of the run; the model card says what others need"
_SYSTEM = "no part of the model"
_LEFT_OUT_FILES = (
    (("training_args.bin",), "Trainer's arguments: a pickle, which no model needs"),
    (("optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scaler.pt", "rng_state*.pth"), _STATE),
    (("trainer_state.json", "saved_files.json", "latest", "zero_to_fp32.py"), _STATE),
    (("recipe.json", "text.json", "start.json", "manifest.json", "results.json", "averaging.json"), _RECORD),
    (("conversion.json",), "record of how it was made of another model"),
    (("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"), _RECORD),
    (("*.translated", "generated_predictions.txt"), "outputs of the model"),
    (("*.log", "events.out.tfevents.*"), "logs"),
    ((".gitattributes", ".gitignore", ".DS_Store", "Thumbs.db", "desktop.ini"), _SYSTEM),
)
_LEFT_OUT_FOLDERS = (
    ((".git", ".cache", "__pycache__", ".ipynb_checkpoints"), _SYSTEM),
    (("checkpoints", "checkpoint-*", "last-checkpoint"), "checkpoints of the run"),
    (("_*",), "an unfinished save or push of the run"),
    (("global_step*", "optimizer_*", "pytorch_model_fsdp*"), _STATE),
    (("cache", "data", "data.partial"), "text and tokens of the run, which may not be yours to publish"),
    (("tokenizer",), "the run's own copy of the tokenizer"),
    ((GRAPH_FOLDER,), "graphs of a translator, which it makes wherever they are wanted"),
    (("merged", "hub"), "a model folder of its own: push it by itself"),
    (("runs", "logs", "wandb", "mlruns", "inspection"), "logs and reports"),
)
_SECRETS = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", "_netrc"),
    *(".git-credentials", ".htpasswd", "token", "token.txt", "*.token", "credentials*", "secrets*", "stored_tokens"),
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill", ".mar", ".ot")
_OTHER_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".tflite", ".pb", ".mlmodel")

# Read anywhere, these names lie inside the folder; on Windows, a backslash or a drive's colon leads out of it.
_UNSAFE_NAME = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]|\.\.|[ .]$')
_SECRET_TEXT = re.compile(rb"\bhf_[A-Za-z0-9]{34}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----")
# A pickle of protocol 2 or newer, and the zip archive in which torch.save and numpy keep them.
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|\x93NUMPY")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file, or a folder that is taken or left as a whole.

    Attributes:
        path: Where it lies in the folder, and would lie in the repository; parts joined by "/".
        size: Bytes; of a folder, of all files in it.
        fate: What becomes of it.
        reason: What it is, or why it is left out or refused.
    """

    path: str
    size: int
    fate: Fate
    reason: str


def read_contents(folder: Path, *, code: Collection[str], card: str) -> list[Entry]:
    """Every file of a folder and what becomes of it, by name, kind and first bytes; sorted by path.

    Args:
        folder: The folder.
        code: Names of the code files that the model needs; every other one is unexpected.
        card: The text of README.md: the images that it shows are uploaded.
    """
    entries = []
    for path in sorted(folder.iterdir()):
        has_files = path.name == EVAL_RESULTS and path.is_dir() and not path.is_symlink()
        for one in sorted(path.iterdir()) if has_files else [path]:
            # It may be gone by now: a training removes the snapshot of each push when that is done.
            with contextlib.suppress(FileNotFoundError):
                entries.append(_entry(folder, one, code, card))
    return entries


def _entry(folder: Path, path: Path, code: Collection[str], card: str) -> Entry:
    name = path.relative_to(folder).as_posix()
    fate, reason = _judge(folder, path, code, card)
    if fate == "upload":
        defect = _defect(path, reason)
        fate, reason = ("refuse", defect) if defect else (fate, reason)
    return Entry(path=name, size=sum(_sizes(path)), fate=fate, reason=reason)


def _judge(folder: Path, path: Path, code: Collection[str], card: str) -> tuple[Fate, str]:
    """The fate of a file or folder by its name and kind, and why."""
    name = path.name
    if _UNSAFE_NAME.search(name):
        return "refuse", f"{name!r} is a name that leads elsewhere, or nowhere, on other systems: rename it"
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        return "refuse", f"a link to {os.readlink(path)}, outside of the folder: copy the file in place of the link"
    if not path.exists():
        return "refuse", f"a link to {os.readlink(path)}, which does not exist: remove it"
    if path.is_dir():
        reason = _match(name, _LEFT_OUT_FOLDERS)
        return ("leave out", reason) if reason else ("refuse", "a folder that no model needs: move it elsewhere")
    if not stat.S_ISREG(path.stat().st_mode):
        return "refuse", "not a plain file: move it elsewhere"
    if path.parent != folder:
        yaml = path.suffix in (".yaml", ".yml")
        return ("upload", "evaluation results") if yaml else ("refuse", "not YAML: move it elsewhere")
    if any(fnmatchcase(name.lower(), pattern) for pattern in _SECRETS):
        return "refuse", "its name says that it holds a secret: move it elsewhere"
    if reason := _match(name, _LEFT_OUT_FILES):
        return "leave out", reason
    if reason := _match(name, _UPLOADED):
        return "upload", reason
    if name in code:
        return "upload", "code"
    if path.suffix.lower() in _IMAGES:
        # Nobody would find the others.
        return ("upload", "image") if name in card else ("refuse", "an image that README.md does not show")
    return "refuse", _why_unexpected(path)


def _why_unexpected(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return "a pickle, which runs code when it is read: weights are saved by `save_pretrained`, as safetensors"
    if suffix in _OTHER_WEIGHTS:
        return "weights that nothing loads from here: move them elsewhere"
    if suffix == ".py":
        return "code that the model does not import: move it elsewhere"
    return "a file that no model needs: move it elsewhere"


def _defect(path: Path, reason: str) -> str | None:
    """Why a file of a good name is not what its name says, without reading weights."""
    size = path.stat().st_size
    if reason == _WEIGHTS:
        return None
    if size > LARGEST:
        return f"{format_size(size)}, and this file should not have more than {format_size(LARGEST)}"
    content = path.read_bytes()
    if _PICKLE_START.match(content):
        return "a pickle or an archive under another name"
    if _SECRET_TEXT.search(content):
        return "it holds what looks like an access token or a private key: take it out"
    return None


def _match(name: str, table: tuple[tuple[tuple[str, ...], str], ...]) -> str | None:
    return next((reason for patterns, reason in table if any(fnmatchcase(name, one) for one in patterns)), None)


def _sizes(path: Path) -> Iterator[int]:
    if not path.is_dir():
        yield path.stat().st_size if path.exists() else 0
    elif not path.is_symlink():
        for root, _, names in os.walk(path):
            yield from (os.lstat(os.path.join(root, name)).st_size for name in names)


def format_size(size: int) -> str:
    """Bytes as people read them, in powers of 1000: "512 B", "1.2 MB"."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f} {units[0]}"
