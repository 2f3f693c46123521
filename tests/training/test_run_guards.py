"""A run never goes on from work that was made of something else, and refuses what would fail after hours."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from sparseq import demo
from sparseq.training.recipes import Recipe, load_recipe
from sparseq.training.run import train

QUICK = [
    "data.source=en",
    "data.target=de",
    "data.max_length=40",
    "decoding.max_length=20",
    "decoding.num_beams=1",
    "tokenizer.vocab_size=400",
    "training.max_steps=2",
    "training.save_steps=1",
    "training.eval_steps=0",
    "training.warmup_steps=1",
]


def corpus(folder: Path, words: str) -> Path:
    folder.mkdir()
    for split, count in (("train", 40), ("val", 4)):
        lines = [" ".join(words[(row + k) % len(words)] * 3 for k in range(5)) for row in range(count)]
        for language in ("en", "de"):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def recipe(folder: Path, *changes: str) -> Recipe:
    return load_recipe("tiny-sparse", [f"data.folder={folder}", *QUICK, *changes])


def test_other_text_in_the_same_output_folder_is_refused(tmp_path: Path) -> None:
    first, second = corpus(tmp_path / "a", "abcdefgh"), corpus(tmp_path / "b", "stuvwxyz")
    train(recipe(first), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"run on other text.*train, val.*--no-resume"):
        train(recipe(second), tmp_path / "out", progress=False)
    # The same text in another place is the same text.
    first.rename(tmp_path / "moved")
    result = train(recipe(tmp_path / "moved"), tmp_path / "out", progress=False)
    assert result.steps == 2
    train(recipe(second), tmp_path / "out", resume=False, progress=False)


def test_what_a_run_left_before_its_first_checkpoint_is_not_used_by_another_recipe(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "a", "abcdefgh")
    train(recipe(folder), tmp_path / "out", progress=False)
    for checkpoint in (tmp_path / "out" / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").unlink(missing_ok=True)
    result = train(recipe(folder, "tokenizer.vocab_size=350"), tmp_path / "out", progress=False)
    assert result.steps == 2
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= 350


def test_a_tokenizer_with_other_special_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "aaa": 2, "<bos>": 3}, unk_token="aaa"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="aaa"
    )
    foreign.save_pretrained(tmp_path / "foreign")
    folder = corpus(tmp_path / "a", "abcdefgh")
    with pytest.raises(ValueError, match="`pad_token_id` is 1, but the model has 0"):
        train(recipe(folder, f"tokenizer.path={tmp_path / 'foreign'}"), tmp_path / "out", progress=False)


def test_learned_positions_shorter_than_the_text_are_refused_at_once(tmp_path: Path) -> None:
    changes = ("model.position_embedding_type=learned", "model.max_position_embeddings=30")
    with pytest.raises(ValueError, match=r"\(30\), but `data.max_length` is 40 and `decoding.max_length` 20"):
        recipe(tmp_path, *changes)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "en", "--test", "t"], r"--source, --test describe the files of --data DIR"),
        (["--data", "d"], r"--data needs --source and --target"),
        (["--data", "d", "--source", "en"], r"--data needs --target"),
        (["training.max_stpes=3"], r"did you mean `max_steps`"),
        (["--recipe", "dmo"], r"no recipe named 'dmo' \(did you mean `demo`"),
    ],
)
def test_mistakes_in_the_arguments_of_the_demo(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        demo._settle(arguments(*words))


@pytest.mark.parametrize("name", ["2016", "my #1", "null", "a: b", "täglich"])
def test_any_folder_name_reaches_the_recipe(name: str) -> None:
    settled: Any = demo._settle(arguments("--data", name, "--source", "no", "--target", "de"))[0]
    assert settled.data.folder == name
    assert settled.data.source == "no"


def test_quick_and_whole_demos_do_not_share_a_folder() -> None:
    folders = {demo._settle(arguments(*words))[1] for words in ([], ["--quick"])}
    assert len(folders) == 2
