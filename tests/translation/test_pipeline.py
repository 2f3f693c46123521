"""`pipeline("sparseq-translation")`: the library's interface, a translator's translations."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from sparseq.model_folder import GRAPH_FOLDER
from sparseq.translation.pipeline import SparseqTranslationPipeline
from sparseq.translation.translator import Translator
from tests.translation.models import SOURCES, write_model

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", ("de", "fr"))


def expected(folder: Path, **options: Any) -> list[list[dict[str, Any]]]:
    translator = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    found = translator.translate(SOURCES, target_language="fr", **options)
    return [[{"translation_text": one.text, "score": one.score} for one in each.hypotheses] for each in found]


def test_it_is_there_after_either_import(folder: Path) -> None:
    script = (
        "{}; {}; pipe = pipeline('sparseq-translation', model=r'{}', target_language='fr', device='cpu')\n"
        "print(pipe('A dog.')[0]['translation_text'])"
    )
    ours, theirs = "import sparseq", "from transformers import pipeline"
    texts = set()
    for first, second in ((ours, theirs), (theirs, ours)):
        command = [sys.executable, "-c", script.format(first, second, folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        texts.add(result.stdout)
    (text,) = texts
    translator = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    assert text.strip() == translator.translate("A dog.", target_language="fr").text


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline("sparseq-translation", model=str(folder), device="cpu", target_language="fr")


def test_one_text_several_and_several_translations(pipe: Any, folder: Path) -> None:
    assert isinstance(pipe, SparseqTranslationPipeline)
    assert pipe(SOURCES[0])[0]["translation_text"] == expected(folder)[0][0]["translation_text"]
    several = [[one] for one in pipe(SOURCES)]
    best = {"num_beams": 3, "num_return_sequences": 2}
    for found, reference in ((several, expected(folder)), (pipe(SOURCES, **best), expected(folder, **best))):
        assert [[one["translation_text"] for one in each] for each in found] == [
            [one["translation_text"] for one in each] for each in reference
        ]
        # The last digits depend on how many threads there are.
        for each, other in zip(found, reference, strict=True):
            assert [one["score"] for one in each] == pytest.approx([one["score"] for one in other], rel=1e-5)
    german = pipe(SOURCES[0], target_language="de")
    assert german != pipe(SOURCES[0])


def test_streams_are_read_as_they_come(pipe: Any, folder: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield from SOURCES

    stream = pipe(endless())
    assert [next(stream)["translation_text"] for _ in SOURCES] == [
        one[0]["translation_text"] for one in expected(folder)
    ]
    stream.close()

    class Records(Dataset[dict[str, str]]):
        def __len__(self) -> int:
            return len(SOURCES)

        def __getitem__(self, index: int) -> dict[str, str]:
            return {"en": SOURCES[range(len(SOURCES))[index]]}

    found = list(pipe(KeyDataset(Records(), "en")))
    assert [one["translation_text"] for one in found] == [one[0]["translation_text"] for one in expected(folder)]


def test_a_model_in_memory_is_run_itself(folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe: Any = pipeline("sparseq-translation", model=model, tokenizer=tokenizer, device="cpu")
    text = Translator.from_model(model, tokenizer).translate(SOURCES[0], target_language="fr").text
    assert pipe(SOURCES[0], target_language="fr")[0]["translation_text"] == text
    assert text != expected(folder)[0][0]["translation_text"]


def test_another_runtime_runs_the_checkpoint(folder: Path) -> None:
    pipe: Any = pipeline(
        "sparseq-translation", model=str(folder), runtime="onnx", threads=1, num_beams=2, target_language="fr"
    )
    assert (folder / GRAPH_FOLDER).is_dir()
    found = [one["translation_text"] for one in pipe(SOURCES)]
    assert found == [one[0]["translation_text"] for one in expected(folder, num_beams=2)]


def test_mistakes_name_the_setting(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"`beams` is no setting of translation\. Did you mean num_beams\?"):
        pipe("A dog.", beams=3)


def test_a_saved_pipeline_is_a_models_folder(pipe: Any, folder: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = pipeline("sparseq-translation", model=str(tmp_path / "saved"), target_language="fr")
    assert again(SOURCES[0])[0]["translation_text"] == pipe(SOURCES[0])[0]["translation_text"]
