"""Which runtime decodes, and the graphs that are made once and kept."""

import gc
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import sparseq
from sparseq.graphs import files
from sparseq.model_folder import GRAPH_FOLDER
from sparseq.translation import runtimes
from sparseq.translation.runtimes import Choice, open_backend, prepare_graphs
from sparseq.translation.translator import Translator
from tests.conversion.checkpoints import write_checkpoint
from tests.hub.server import HubServer
from tests.translation.models import SOURCES, write_model

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy without graphs."""
    shutil.copytree(model, tmp_path / "tiny", ignore=shutil.ignore_patterns(GRAPH_FOLDER))
    return tmp_path / "tiny"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where graphs were made."""
    made: list[Path] = []
    export = files.export_graphs

    def spy(model: Any, place: Path, **options: Any) -> None:
        made.append(Path(place))
        export(model, place, **options)

    monkeypatch.setattr(files, "export_graphs", spy)
    return made


def translated(translator: Translator, **options: Any) -> list[list[str]]:
    return [[one.text for one in found.hypotheses] for found in translator.translate(SOURCES, **options)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 3}, {"target_prefix": "Ein Mann"}])
def test_both_runtimes_translate_alike(model: Path, options: dict[str, Any]) -> None:
    fast = Translator.from_pretrained(model, runtime="onnx", device="cpu")
    slow = Translator.from_pretrained(model, runtime="torch", device="cpu")
    assert "ONNX Runtime" in repr(fast)
    assert translated(fast, **options) == translated(slow, **options)
    one, other = (translator.translate(SOURCES[0], return_attention=True, **options) for translator in (fast, slow))
    assert one.score == pytest.approx(other.score, rel=1e-4)
    assert one.source_tokens == other.source_tokens
    first, second = one.hypotheses[0].attention, other.hypotheses[0].attention
    assert first is not None
    assert first == pytest.approx(second, abs=1e-4)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_that_were_saved_in_int8_are_run_by_pytorch(
    model: Path, folder: Path, precision: Any, caplog: pytest.LogCaptureFixture
) -> None:
    int8 = AutoModelForSeq2SeqLM.from_pretrained(model, quantization_config=sparseq.SparseqInt8Config())
    int8.save_pretrained(folder)
    expected = translated(Translator.from_pretrained(model, precision="int8", runtime="torch", device="cpu"))
    with caplog.at_level(logging.WARNING):
        found = Translator.from_pretrained(folder, precision=precision, device="cpu")
    assert translated(found) == expected
    assert "has int8 weights, which PyTorch can run" in caplog.text
    with pytest.raises(ValueError, match="name the folder with the floating-point weights"):
        Translator.from_pretrained(folder, precision=precision, runtime="onnx")


def test_graphs_are_made_once_and_kept(
    folder: Path, exported: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sparseq.Translator.from_pretrained(folder, device="cpu")
    (place,) = exported
    assert place.parent == folder / GRAPH_FOLDER
    assert place.name.startswith("onnx-float32-")
    assert f"sparseq: making graphs for ONNX Runtime, once: {place}" in capsys.readouterr().err
    monkeypatch.setattr(runtimes, "load_model", None)
    again = sparseq.Translator.from_pretrained(folder, device="cpu", threads=1)
    assert exported == [place]
    assert capsys.readouterr().err == ""
    assert translated(again) == translated(first)


def test_other_weights_have_other_graphs(folder: Path, exported: list[Path]) -> None:
    Translator.from_pretrained(folder, device="cpu")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(folder)
    changed = Translator.from_pretrained(folder, device="cpu")
    assert len(set(exported)) == 2
    slow = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    assert translated(changed) == translated(slow)


def test_graphs_lie_where_they_can(
    folder: Path, exported: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No folder of this name can be made.
    (folder / GRAPH_FOLDER).write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prepare_graphs(folder, "float32").parent == tmp_path / "cache" / "sparseq"
    assert prepare_graphs(folder, "float32", tmp_path / "own").parent == tmp_path / "own"
    assert len(exported) == 2
    prepare_graphs(folder, "float32")
    prepare_graphs(folder, "float32", tmp_path / "own")
    assert len(exported) == 2


def test_an_export_that_was_killed_is_not_taken_for_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.onnx, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Translator.from_pretrained(folder, device="cpu")
    assert not list((folder / GRAPH_FOLDER).glob("onnx-*"))
    slow = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    assert translated(Translator.from_pretrained(folder, device="cpu")) == translated(slow)


@pytest.mark.parametrize("name", ["weights.bin", "encoder.onnx", "step_attention.onnx", "graphs.json", None])
def test_damaged_graphs_are_made_anew(
    folder: Path, exported: list[Path], caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    expected = translated(Translator.from_pretrained(folder, runtime="onnx"))
    # No file of the first is mapped into memory any more.
    gc.collect()
    (place,) = exported
    for path in place.iterdir():
        if name is None:
            path.unlink()
        elif path.name == name:
            path.unlink() if name == "graphs.json" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = Translator.from_pretrained(folder, runtime="onnx")
    assert exported == [place, place]
    assert f"{place} is damaged, so its graphs are made anew" in caplog.text
    assert translated(again) == expected


def test_damaged_graphs_that_cannot_be_removed_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Translator.from_pretrained(folder, runtime="onnx")
    (place,) = (folder / GRAPH_FOLDER).glob("onnx-*")
    (place / "graphs.json").unlink()
    monkeypatch.setattr(runtimes.shutil, "rmtree", cannot_write)
    with pytest.raises(OSError, match=re.escape(f"{place} is damaged: remove it, and it is made again")):
        Translator.from_pretrained(folder, runtime="onnx")
    assert "generate()" in repr(Translator.from_pretrained(folder, device="cpu"))
    assert f"{place} is damaged: remove it" in caplog.text


def cannot_write(*args: Any, **options: Any) -> None:
    raise OSError(30, "Read-only file system")


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_where_graphs_can_be_kept_nowhere_generate_decodes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / GRAPH_FOLDER).write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    translator = Translator.from_pretrained(folder, device="cpu")
    assert "generate()" in repr(translator)
    assert translator.translate(SOURCES[0]).text
    message = re.escape(f"graphs cannot be kept in {folder / GRAPH_FOLDER}") + ".*another folder with `cache_dir`"
    assert re.search(message, caplog.text)
    with pytest.raises(OSError, match=message):
        Translator.from_pretrained(folder, runtime="onnx")
    # Neither needs a home.
    own = Translator.from_pretrained(folder, runtime="onnx", cache_dir=tmp_path / "own")
    assert translated(own) == translated(translator)
    (folder / GRAPH_FOLDER).unlink()
    assert "ONNX" in repr(Translator.from_pretrained(folder, device="cpu"))


def test_a_full_disk_is_no_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files.onnx, "save", cannot_write)
    assert "generate()" in repr(Translator.from_pretrained(folder, device="cpu"))
    assert "Read-only file system): name another folder with `cache_dir`" in caplog.text
    with pytest.raises(OSError, match="Read-only file system"):
        Translator.from_pretrained(folder, runtime="onnx")
    assert not list((folder / GRAPH_FOLDER).glob("onnx-*"))


def test_of_two_at_once_one_makes_the_graphs(
    folder: Path, exported: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load, is_loading, goes_on = runtimes.load_model, threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        is_loading.set()
        goes_on.wait(60)
        return load(*args, **options)

    monkeypatch.setattr(runtimes, "load_model", slow)
    with ThreadPoolExecutor() as pool:
        one = pool.submit(prepare_graphs, folder, "float32")
        assert is_loading.wait(60)
        other = pool.submit(prepare_graphs, folder, "float32")
        with pytest.raises(TimeoutError):
            other.result(timeout=0.5)
        goes_on.set()
        assert one.result(60) == other.result(60)
    assert len(exported) == 1
    assert not caplog.records


def interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_generate_decodes(
    folder: Path, package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    with caplog.at_level(logging.WARNING, logger="sparseq"):
        translator = Translator.from_pretrained(folder, device="cpu")
    (warning,) = [record for record in caplog.records if record.name.startswith("sparseq")]
    assert f'the package {package} is not installed: pip install "sparseq[onnx]"' in warning.getMessage()
    assert "generate()" in repr(translator)
    assert translator.translate(SOURCES[0]).text
    with pytest.raises(ModuleNotFoundError, match=f"the package {package} is not installed") as error:
        Translator.from_pretrained(folder, runtime="onnx")
    assert error.value.name == package


def test_an_earlier_onnxruntime_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtimes, "_ONNX_RUNTIME", "999")
    with pytest.raises(ImportError, match=r"onnxruntime>=999 is required.*found onnxruntime==(.|\n)*pip install"):
        Translator.from_pretrained(folder, runtime="onnx")
    assert "generate()" in repr(Translator.from_pretrained(folder, device="cpu"))
    assert "onnxruntime>=999 is required" in caplog.text


def test_models_without_graphs_are_decoded_by_generate(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    marian = write_checkpoint("marian", tmp_path / "marian")
    assert "generate()" in repr(Translator.from_pretrained(marian, device="cpu"))
    assert "graphs are made of Sparseq models, and it is a model of type 'marian'" in caplog.text
    with pytest.raises(ValueError, match="make a Sparseq model of it with `sparseq convert`"):
        Translator.from_pretrained(marian, runtime="onnx")

    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError("there is no operator for this")

    monkeypatch.setattr(files, "export_graphs", refuse)
    assert "generate()" in repr(Translator.from_pretrained(folder, device="cpu"))
    assert "there is no operator for this" in caplog.text


@pytest.mark.parametrize("has_file", [True, False])
def test_generation_settings_are_those_of_the_model(folder: Path, has_file: bool) -> None:
    if not has_file:
        (folder / "generation_config.json").unlink()
    config = sparseq.SparseqConfig.from_pretrained(folder)
    one, other = (
        {name: value for name, value in settings.to_dict().items() if not name.startswith("output_")}
        for settings in (
            open_backend(folder, config, Choice(runtime="onnx", device="cpu"))[1],
            open_backend(folder, config, Choice(runtime="torch", device="cpu"))[1],
        )
    )
    assert one == other
    assert one["max_length"] == (14 if has_file else None)
    # To generate(), none is 20.
    assert Translator.from_pretrained(folder, device="cpu").generation_config.max_length == (14 if has_file else 256)


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_int8_is_near_float32(model: Path, runtime: Any) -> None:
    exact = Translator.from_pretrained(model, runtime=runtime, device="cpu")
    rounded = Translator.from_pretrained(model, runtime=runtime, device="cpu", precision="int8")
    text = exact.translate(SOURCES[0]).text
    forced = {"target_prefix": text, "max_new_tokens": 1}
    one, other = exact.translate(SOURCES[0], **forced), rounded.translate(SOURCES[0], **forced)
    assert one.score != other.score
    assert one.score == pytest.approx(other.score, abs=0.5)


def test_int8_of_other_models_is_refused(tmp_path: Path) -> None:
    marian = write_checkpoint("marian", tmp_path / "marian")
    with pytest.raises(ValueError, match="type 'marian', which has no `precision=\"int8\"` here"):
        Translator.from_pretrained(marian, precision="int8", runtime="torch")


def test_a_repository_of_the_hub(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys, sparseq\n"
        "translator = sparseq.Translator.from_pretrained('owner/tiny', device='cpu', revision=sys.argv[1])\n"
        "print(repr(translator), translator.translate('A dog.').text, sep='|')"
    )
    files_of_model = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    with HubServer(tmp_path / "storage") as hub:
        hub.create("owner/tiny")
        # Graphs that somebody has put there are not taken.
        commit = hub.put("owner/tiny", files_of_model | {f"{GRAPH_FOLDER}/onnx-float32-0/graphs.json": b"{}"})
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, commit],
            cwd=home,
            env={**hub.environment(home / "hf", token=None), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
        asked = [path for _, path in hub.requests]
    assert result.returncode == 0, result.stderr
    name, text = result.stdout.strip().split("|")
    assert name == "Translator('owner/tiny', runtime='ONNX Runtime')"
    assert text == Translator.from_pretrained(model, device="cpu").translate("A dog.").text
    assert not [path for path in asked if "graphs.json" in path]
