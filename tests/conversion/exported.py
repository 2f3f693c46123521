"""Models that the tests export: saved with a tokenizer, exported by the command, run as their README.md says."""

import contextlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparseq import SparseqForConditionalGeneration
from sparseq.cli import main
from sparseq.training.tokenizer import train_tokenizer
from tests.absent import run_without_package
from tests.conversion.changing import random_model
from tests.conversion.checkpoints import write_checkpoint
from tests.conversion.tokenizer_folders import SENTENCES

NEW_TOKENS = 12
TEXTS = [f"<2de> {SENTENCES[0]}", "<2de> A dog.", f"<2de> {SENTENCES[3]}"]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(SENTENCES * 4, vocab_size=300, language_tags=["de"], show_progress=False)


def write_model(folder: Path, seed: int = 0, **overrides: Any) -> SparseqForConditionalGeneration:
    """A random model with the tokenizer, saved; translations of some sources end early, of others they do not."""
    # A random model with tied embeddings repeats its last token.
    fields = {"vocab_size": len(tokenizer()), "final_logits_bias": True, "tie_word_embeddings": False}
    model = random_model(seed, **{**fields, **overrides})
    if model.final_logits_bias is not None:
        model.final_logits_bias[0, model.config.eos_token_id] += 3.0
    model.generation_config.update(max_length=None, max_new_tokens=NEW_TOKENS, early_stopping=None)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def export(*arguments: Any) -> None:
    assert main(["export", *map(str, arguments)]) == 0


def sources() -> torch.Tensor:
    """Ids `(B, S)` of the texts, padded on the right."""
    ids: torch.Tensor = tokenizer()(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def generated(model: SparseqForConditionalGeneration, **options: Any) -> list[list[int]]:
    """What the model writes for the texts: neither start, nor end, nor what follows it."""
    rows = model.generate(sources(), attention_mask=sources().ne(0).long(), **options)[:, 1:].tolist()
    end = model.config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


def readme_program(folder: Path) -> str:
    """The program in README.md of an exported folder, which runs in that folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert code
    return code[1]


def run_readme(folder: Path, home: Path, *, call: str) -> Any:
    """Run the program of README.md where this package is not installed.

    Args:
        folder: The folder.
        home: For caches.
        call: A Python expression that is evaluated after it.

    Returns:
        The value, which JSON can have.
    """
    program = f"import os, json\nos.chdir({str(folder)!r})\n{readme_program(folder)}\nprint(json.dumps({call}))"
    return json.loads(run_without_package(program, home=home))


def run_readme_here(folder: Path, *, call: str) -> Any:
    """As `run_readme` in this process, which is quicker where what is installed does not matter."""
    defined: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(readme_program(folder), defined)
    return eval(call, defined)


def check_converted(name: str, language: str | None, to: str, folder: Path) -> None:
    """A checkpoint of another family, converted and exported with its tokenizer, writes what generate() does, by the
    program in README.md.

    Args:
        name: Of `tokenizer_folders.MAKERS`.
        language: To translate into, for a multilingual one.
        to: The target.
        folder: To work in.
    """
    write_checkpoint(name, folder / "source", encoder_layers=1, decoder_layers=1)
    options = ["--target-language", language] if language else []
    assert main(["convert", str(folder / "source"), str(folder / "model"), *options]) == 0
    model = SparseqForConditionalGeneration.from_pretrained(folder / "model")
    model.generation_config.update(max_length=None, max_new_tokens=NEW_TOKENS, forced_eos_token_id=None)
    model.save_pretrained(folder / "model")
    export(folder / "model", folder / "exported", "--to", to)
    own = AutoTokenizer.from_pretrained(folder / "model")
    batch = own(SENTENCES[:2], padding=True, return_tensors="pt")
    rows = model.generate(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    said = run_readme_here(folder / "exported", call=f"translate({SENTENCES[:2]!r})")
    assert said == own.batch_decode(rows, skip_special_tokens=True)
