"""Folders of models: complete or not there, and with their tokenizers."""

from pathlib import Path

import pytest

from sparseq.model_folder import check_new_folder, copy_tokenizer, new_folder


@pytest.mark.parametrize(
    "name", ["vocab-src.json", "vocab.txt", "target_vocab.json", "merges.txt", "spiece.model", "prophetnet.tokenizer"]
)
def test_vocabulary_files_of_seq2seq_tokenizers_are_known(name: str, tmp_path: Path) -> None:
    for folder in ("source", "target"):
        (tmp_path / folder).mkdir()
    for file in (name, "model.safetensors", "README.md"):
        (tmp_path / "source" / file).write_text(file)
    copy_tokenizer(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == [name]
    assert (tmp_path / "target" / name).read_text() == name


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "some" / "model"
    with new_folder(output) as folder:
        (folder / "config.json").write_text("{}")
        assert not output.exists()
    assert (output / "config.json").is_file()
    assert list(output.parent.iterdir()) == [output]


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "config.json").write_text("old")

    def interrupted() -> None:
        with new_folder(output, force=True) as folder:
            (folder / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (output / "config.json").read_text() == "old"
    with new_folder(output, force=True) as folder:
        (folder / "other.json").write_text("new")
    assert [path.name for path in output.iterdir()] == ["other.json"]
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_killed_process_has_left_is_reported_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remains = [tmp_path / ".model.0123abcd.old", tmp_path / ".model.0123abcd.partial"]
    others = [tmp_path / ".model2.0123abcd.partial", tmp_path / ".model.partial", tmp_path / ".model.git"]
    for path in (*remains, *others):
        path.mkdir()
    with new_folder(tmp_path / "model"):
        # Its own is no remainder.
        assert len(list(tmp_path.iterdir())) == 6
    assert [str(path) for path in remains] == [message.split()[0] for message in caplog.messages]
    assert all(path.is_dir() for path in (*remains, *others))


def test_what_must_stay_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    check_new_folder(tmp_path / "absent")
    check_new_folder(tmp_path / "empty")
    check_new_folder(tmp_path / "run" / "checkpoint-1", force=True)
    (tmp_path / "model" / ".sparseq" / "onnx-int8-0").mkdir(parents=True)
    check_new_folder(tmp_path / "model", force=True)
    with pytest.raises(FileExistsError, match="is a file"):
        check_new_folder(tmp_path / "file", force=True)
    with pytest.raises(FileExistsError, match="--force"):
        check_new_folder(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"other folders \(checkpoint-1\)"):
        check_new_folder(tmp_path / "run", force=True)
    with pytest.raises(FileExistsError, match="must stay"):
        check_new_folder(tmp_path / "run", force=True, keep=[tmp_path / "run" / "checkpoint-1"])
