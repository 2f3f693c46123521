"""A small bilingual corpus and one tokenizer of each algorithm, trained once for all tests of this folder."""

import warnings
from collections.abc import Callable

import pytest

from sparseq import SparseqTokenizer
from sparseq.training.tokenizer import Algorithm, train_tokenizer

ENGLISH = [
    f"{who} {what} {where}."
    for who in ("The old man", "A young girl", "Two dogs", "My friend's mother")
    for what in ("walks slowly", "is standing", "plays the guitar", "eats 12 apples")
    for where in ("in the garden", "near the river", "at home, alone")
]
GERMAN = [
    f"{who} {what} {where}."
    for who in ("Der alte Mann", "Ein junges Mädchen", "Zwei Hunde", "Die Mutter meines Freundes")
    for what in ("geht langsam", "steht still", "spielt Gitarre", "isst 12 Äpfel")
    for where in ("im Garten", "nahe dem Fluß", "zu Hause, allein")
]

Train = Callable[..., SparseqTokenizer]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return ENGLISH + GERMAN


@pytest.fixture(scope="session")
def train(corpus: list[str]) -> Train:
    """Train on the corpus, or on `texts`, silently; the corpus fills 420 tokens with room to spare."""

    def run(texts: list[str] | None = None, **options: object) -> SparseqTokenizer:
        arguments: dict[str, object] = {"vocab_size": 420, "show_progress": False, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return train_tokenizer(corpus if texts is None else texts, **arguments)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def tokenizer(train: Train) -> SparseqTokenizer:
    return train(language_tags=["de", "fr"])


@pytest.fixture(scope="session", params=["bpe-bytes", "bpe", "unigram"])
def any_tokenizer(request: pytest.FixtureRequest, train: Train) -> SparseqTokenizer:
    algorithm: Algorithm = request.param
    return train(algorithm=algorithm, language_tags=["de"], vocab_size=420 if algorithm == "bpe-bytes" else 160)
