"""What `train_tokenizer` promises: sizes, refusals, options, the same result every time, and the report."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from sparseq import SparseqTokenizer
from sparseq.training.tokenizer import (
    Algorithm,
    format_report,
    smallest_vocab_size,
    tokenizer_report,
    train_tokenizer,
)

Train = Callable[..., SparseqTokenizer]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_vocabulary_size_is_the_whole_size(train: Train, corpus: list[str], algorithm: Algorithm) -> None:
    size = smallest_vocab_size(corpus, algorithm=algorithm, language_tags=["de"]) + 50
    tokenizer = train(algorithm=algorithm, language_tags=["de"], vocab_size=size)
    assert len(tokenizer) == tokenizer.vocab_size == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_smallest_size_works_and_less_is_refused(train: Train, corpus: list[str], algorithm: Algorithm) -> None:
    characters = len(set("".join(corpus)))
    expected = 4 + 2 + characters + (256 if algorithm == "bpe-bytes" else 0)
    options: dict[str, Any] = {"algorithm": algorithm, "language_tags": ["de", "fr"]}
    assert smallest_vocab_size(corpus, **options) == expected
    with pytest.raises(ValueError, match=rf"`vocab_size` is {expected - 1}, but the smallest .* is {expected}:"):
        train(vocab_size=expected - 1, **options)
    tokenizer = train(vocab_size=expected, **options)
    assert len(tokenizer) == expected
    assert tokenizer.decode(tokenizer.encode(corpus[-1]), skip_special_tokens=True) == corpus[-1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_too_little_text_is_said_with_the_size_reached(corpus: list[str], algorithm: Algorithm) -> None:
    with pytest.warns(UserWarning, match=r"vocabulary of \d+ tokens; 50000 were asked for") as caught:
        tokenizer = train_tokenizer(corpus, vocab_size=50_000, algorithm=algorithm, show_progress=False)
    assert f"vocabulary of {len(tokenizer)} tokens" in str(caught[0].message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "one string"}, "write \\[text\\]"),
        ({"texts": []}, "no text to train on"),
        ({"texts": ["", "  ", "\n"]}, "no text to train on"),
        ({"texts": ["good", None]}, "Text number 2 is None"),
        ({"texts": ["good", "bad \ud800"]}, "Text number 2 holds a lone surrogate"),
        ({"algorithm": "wordpiece"}, "bpe-bytes, bpe, unigram, but is 'wordpiece'"),
        ({"normalization": "nfd"}, "but is 'nfd'"),
        ({"language_tags": "de"}, "must be a list"),
        ({"language_tags": ["de", "<2de>"]}, "<2de> was given more than once"),
        ({"language_tags": ["d e"]}, "'d e' is not a language code"),
        ({"min_frequency": 0}, "`min_frequency` must be at least 1, but is 0"),
        ({"character_coverage": 0.0}, "at most 1, but is 0"),
        ({"character_coverage": 1.5}, "at most 1, but is 1.5"),
        ({"model_max_length": 0}, "`model_max_length` must be at least 1, but is 0"),
        ({"vocab_size": 0}, "`vocab_size` is 0"),
    ],
)
def test_refusals(train: Train, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_normalization_and_case(train: Train) -> None:
    tokenizer = train(normalization="nfc", lowercase=True, vocab_size=400)
    assert tokenizer.encode("MA\u0308DCHEN") == tokenizer.encode("m\u00e4dchen")
    assert tokenizer.decode(tokenizer.encode("MA\u0308DCHEN"), skip_special_tokens=True) == "m\u00e4dchen"
    compatible = train(normalization="nfkc")
    assert compatible.encode("\ufb01") == compatible.encode("fi")
    assert tokenizer.encode("\ufb01") != tokenizer.encode("fi")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rare_characters_lose_their_tokens(train: Train, corpus: list[str], algorithm: Algorithm) -> None:
    texts = [*corpus, "\u6f22\u5b57"]
    total = sum(map(len, texts)) + len(texts)
    size = 400 if algorithm == "bpe-bytes" else 140
    tokenizer = train(texts, algorithm=algorithm, vocab_size=size, character_coverage=1 - 2 / total)
    assert not any(character in "".join(tokenizer.get_vocab()) for character in "\u6f22\u5b57")
    assert len(tokenizer) == size
    kept = train(texts, algorithm=algorithm, vocab_size=size)
    assert {"\u6f22", "\u5b57"} <= set("".join(kept.get_vocab()))


def test_byte_tokens_leave_the_merges_alone(train: Train, corpus: list[str]) -> None:
    """Known characters are cut as plain BPE cuts them: the byte tokens only move the ids."""
    with_bytes = train(vocab_size=450)
    plain = train(vocab_size=450 - 256, algorithm="bpe")
    for text in corpus:
        assert with_bytes.tokenize(text) == plain.tokenize(text)


def test_literal_byte_and_special_tokens_in_the_texts_make_no_pieces(train: Train) -> None:
    texts = ["<0x41> <0x41><2de> <s> </s>"] * 50 + ["A plain text with more letters in it, and more."] * 50
    tokenizer = train(texts, vocab_size=310)
    assert tokenizer.encode("<0x41>", add_special_tokens=False) != tokenizer.convert_tokens_to_ids(["<0x41>"])
    assert tokenizer.decode(tokenizer.encode("<0x41>", add_special_tokens=False)) == "<0x41>"
    assert "<2de>" not in tokenizer.get_vocab()


def test_digits_stand_alone(train: Train) -> None:
    tokenizer = train(["1984 1984 2024 2024 apples"] * 20, vocab_size=278)
    assert [token.strip() for token in tokenizer.tokenize("1984")] == ["1", "9", "8", "4"]


def ambiguous_texts() -> list[str]:
    """Words whose pairs and pieces are equally frequent, so that the order of every tie is decided by something."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=6)) for _ in range(300)]
    return [" ".join(words[start : start + 10]) for start in range(0, 300, 10)] * 2


def test_the_same_file_in_every_process(tmp_path: Path) -> None:
    """Hash seeds, thread counts and processes do not show in `tokenizer.json`, not even where frequencies tie."""
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(ambiguous_texts()), "utf-8")
    code = (
        "import sys\n"
        "from sparseq.training.tokenizer import train_tokenizer\n"
        "texts = open(sys.argv[1], encoding='utf-8').read().split('\\n')\n"
        "for algorithm in sys.argv[3:]:\n"
        "    tokenizer = train_tokenizer(texts, vocab_size=400, algorithm=algorithm, character_coverage=0.95,\n"
        "                                language_tags=['de'], show_progress=False)\n"
        "    tokenizer.save_pretrained(f'{sys.argv[2]}/{algorithm}')\n"
    )
    runs = []
    for seed, parallel, threads in (("0", "false", "1"), ("1", "true", "2"), ("2", "true", "5")):
        target = tmp_path / f"run-{seed}"
        variables = {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": threads}
        subprocess.run(
            [sys.executable, "-c", code, str(data), str(target), *ALGORITHMS],
            cwd=ROOT,
            env=os.environ | variables | {"OMP_NUM_THREADS": threads},
            check=True,
        )
        runs.append([(target / algorithm / "tokenizer.json").read_bytes() for algorithm in ALGORITHMS])
    assert runs[0] == runs[1] == runs[2]


def test_report_counts(tokenizer: SparseqTokenizer) -> None:
    texts = ["The old man", "\u65e5"]
    ids = [number for text in texts for number in tokenizer.encode(text, add_special_tokens=False)]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    report = tokenizer_report(tokenizer, texts)
    assert report["vocab_size"] == len(tokenizer)
    assert (report["texts"], report["words"], report["characters"], report["tokens"]) == (2, 4, 12, len(ids))
    assert report["tokens_per_word"] == len(ids) / 4
    assert report["characters_per_token"] == 12 / len(ids)
    assert report["byte_rate"] == 3 / len(ids)
    assert report["unknown_rate"] == 0
    ordinary = len(tokenizer) - 256 - len(tokenizer.all_special_ids)
    assert report["vocabulary_used"] == len({piece for piece in pieces if "<0x" not in piece}) / ordinary


def test_report_knows_unknowns(train: Train) -> None:
    plain = train(algorithm="bpe", vocab_size=150)
    assert tokenizer_report(plain, ["\u65e5"])["unknown_rate"] == 0.5


def test_report_by_language_adds_up(tokenizer: SparseqTokenizer, corpus: list[str]) -> None:
    groups = {"en": corpus[:48], "de": corpus[48:]}
    report = tokenizer_report(tokenizer, groups)
    languages = report.pop("languages")
    assert report == tokenizer_report(tokenizer, corpus)
    for language, texts in groups.items():
        alone = tokenizer_report(tokenizer, texts)
        del alone["vocab_size"]
        assert languages[language] == alone


def test_report_as_a_table(tokenizer: SparseqTokenizer, corpus: list[str]) -> None:
    report = tokenizer_report(tokenizer, {"en": corpus[:48], "de": corpus[48:]})
    first, head, *rows = format_report(report).splitlines()
    assert first == "vocabulary: 420 tokens"
    assert [row.split()[0] for row in rows] == ["en", "de", "all"]
    assert len({len(line) for line in [head, *rows]}) == 1
    assert f"{report['languages']['de']['tokens_per_word']:.3f}" in rows[1]


@pytest.mark.parametrize("texts", [[], [""], {"en": []}])
def test_report_without_text(tokenizer: SparseqTokenizer, texts: Any) -> None:
    with pytest.raises(ValueError, match="no text to measure"):
        tokenizer_report(tokenizer, texts)
