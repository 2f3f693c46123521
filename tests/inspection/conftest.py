"""A tiny sparse model with its tokenizer, as a user would have saved it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from sparseq.training.tokenizer import train_tokenizer
from tests.tiny import tiny_config, tiny_model

SENTENCES = {
    "en": [
        "A man walks .",
        "A small dog runs in the park .",
        "Two dogs !",
        "The man sees a dog .",
        "A man and a man .",
    ],
    "de": [
        "Ein Mann geht .",
        "Ein Hund rennt im Park .",
        "Zwei Hunde !",
        "Der Mann sieht einen Hund .",
        "Zwei Männer",
    ],
    "fr": ["Un homme marche .", "Un chien court dans le parc .", "Deux chiens !", "L'homme voit un chien .", "Deux"],
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = [text for texts in SENTENCES.values() for text in texts]
    return train_tokenizer(texts, vocab_size=340, language_tags=["de", "fr"], show_progress=False)


@pytest.fixture(scope="session")
def sentences() -> dict[str, list[str]]:
    """Sentences by language; those at one place translate each other."""
    return SENTENCES


@pytest.fixture(scope="session")
def fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Configuration of models that go with the tokenizer: two sparse layers in each stack, 4 experts, top-2."""
    return {"vocab_size": len(tokenizer)}


@pytest.fixture(scope="session")
def checkpoint(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sparse"
    model = tiny_model(**fields)
    assert model.config.to_dict() == tiny_config(**fields).to_dict()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
