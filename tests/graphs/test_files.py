"""The folder of graphs: what it holds, how it comes about, and the name it is kept under."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sparseq.graphs import files
from sparseq.graphs.files import export_graphs, graph_folder_name, read_record
from tests.graphs.exported import ExportedModel
from tests.tiny import source_batch, tiny_model


def test_every_weight_is_stored_once(tmp_path: Path) -> None:
    model = tiny_model(d_model=64, vocab_size=500)
    export_graphs(model, tmp_path / "graphs")
    stored = (tmp_path / "graphs" / "weights.bin").stat().st_size
    parameters = 4 * model.num_parameters()
    # Each tensor begins at a multiple of 4,096 bytes, and those below 1,024 bytes travel in the graphs.
    assert 0.8 * parameters < stored < parameters + 100 * 4096
    for path in (tmp_path / "graphs").glob("*.onnx"):
        onnx.checker.check_model(str(path))
        assert path.stat().st_size < 100_000


def test_the_record_describes_what_the_graphs_take_and_give(tmp_path: Path) -> None:
    model = tiny_model()
    export_graphs(model, tmp_path / "graphs")
    record = read_record(tmp_path / "graphs")
    assert (record["precision"], record["config"]["num_experts"]) == ("float32", 4)
    assert set(record["graphs"]) == {"encoder", "prefill", "step", "step_attention", "likeliest"}
    source = source_batch().numpy()
    graphs = ExportedModel(tmp_path / "graphs")
    lengths = {"B": 3, "S": 9, "R": 3, "present": 2}
    encoded = graphs.run("encoder", input_ids=source, attention_mask=np.ones_like(source))
    given = encoded | graphs.run("prefill", tokens=source[:, :2], **encoded)
    described = record["graphs"]["encoder"]["outputs"] | record["graphs"]["prefill"]["outputs"]
    assert set(given) == set(described)
    for name, (dtype, shape) in described.items():
        assert (given[name].dtype, list(given[name].shape)) == (
            dtype,
            [lengths.get(length, length) for length in shape],
        )


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="graphs"):
        export_graphs(tiny_model(), tmp_path / "graphs")
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == ["notes.txt"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export_graphs(tiny_model(), tmp_path / "graphs")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['float32', 'int8'\].*'int4'"):
        export_graphs(tiny_model(), tmp_path / "graphs", precision="int4")  # type: ignore[arg-type]


def test_a_record_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_graphs(tiny_model(), tmp_path / "graphs")
    monkeypatch.setattr(files, "GRAPH_FORMAT", files.GRAPH_FORMAT + 1)
    with pytest.raises(ValueError, match=rf"format {files.GRAPH_FORMAT - 1}.*format {files.GRAPH_FORMAT}:"):
        read_record(tmp_path / "graphs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


def changed_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_name_depends_on_what_the_checkpoint_holds(checkpoint: Path, tmp_path: Path) -> None:
    name = graph_folder_name(checkpoint, "float32")
    assert name.startswith("onnx-float32-")
    assert len(name) == len("onnx-float32-") + 16

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "model.safetensors").touch()
    changed_config(copy, transformers_version="9.9.9")
    assert graph_folder_name(copy, "float32") == name

    assert graph_folder_name(copy, "int8") == name.replace("float32", "int8")
    changed_config(copy, norm_eps=1e-5)
    assert graph_folder_name(copy, "float32") != name

    other = tmp_path / "other"
    model = tiny_model()
    with torch.no_grad():
        model.model.shared.weight[-1, -1] += 1e-3
    model.save_pretrained(other)
    assert graph_folder_name(other, "float32") != name


def test_a_folder_without_weights_has_no_name(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        graph_folder_name(tmp_path, "float32")
