"""The toy corpus, written once for all who only read it."""

from pathlib import Path

import pytest

from tests.training.toy import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "corpus"
    write_corpus(folder)
    return folder
