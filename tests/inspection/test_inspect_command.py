"""`sparseq inspect experts` from the command line: every form of data, what is written, and what is refused."""

import builtins
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import MarianConfig

from sparseq import SparseqConfig, SparseqEncoderModel
from sparseq.cli import main
from tests.tiny import tiny_config, tiny_model

Corpus = dict[str, list[str]]


@pytest.fixture
def corpus(sentences: Corpus, tmp_path: Path) -> Path:
    """A folder with test.{en,de,fr}, test.fr compressed, and the same as a table."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for language, texts in sentences.items():
        (folder / f"test.{language}").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    french = folder / "test.fr"
    (folder / "test.fr.gz").write_bytes(gzip.compress(french.read_bytes()))
    french.unlink()
    rows = [
        {"source": source, "target": target, "language": language}
        for language in ("de", "fr")
        for source, target in zip(sentences["en"], sentences[language], strict=True)
    ]
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return folder


@pytest.fixture
def inspect(checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command and return the JSON that it wrote."""

    def run(*arguments: object, model: Path = checkpoint) -> dict[str, Any]:
        output = tmp_path / "output"
        assert main(["inspect", "experts", str(model), *map(str, arguments), "--output", str(output)]) == 0
        report: dict[str, Any] = json.loads((output / "experts.json").read_text("utf-8"))
        assert (output / "experts.html").is_file()
        assert (output / "experts.png").read_bytes().startswith(b"\x89PNG")
        return report

    return run


def fails(*arguments: object) -> None:
    assert main(["inspect", "experts", *map(str, arguments)]) == 2


def layers(report: dict[str, Any], group: int = 0) -> Any:
    return report["groups"][group]["layers"]


def assert_same_layers(found: Any, expected: Any) -> None:
    """Equal but for the rounding of sums, where a run with one stack has other batches than one with two."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        rounded = {name: pytest.approx(other[name], rel=1e-5) for name in ("router_entropy", "mean_top1_probability")}
        assert one == {**other, **rounded}


def test_every_form_of_data_gives_the_same(corpus: Path, inspect: Callable[..., dict[str, Any]]) -> None:
    folder = inspect("--data", corpus, "--source", "en", "--target", "de")
    files = inspect("--data", corpus / "test.en", "--target", corpus / "test.de")
    by_language = inspect("--data", corpus / "test.jsonl", "--by", "language", "--tag-column", "language")
    assert [group["name"] for group in by_language["groups"]] == ["all data", "de", "fr"]
    assert layers(folder) == layers(files) == layers(by_language, 1)
    assert [(layer["stack"], layer["layer"]) for layer in layers(folder)] == [
        ("encoder", 0),
        ("encoder", 1),
        ("decoder", 0),
        ("decoder", 1),
    ]
    assert [len(layer["load"]) for layer in layers(folder)] == [4] * 4
    # All of these know the target language, so the tag is there; a table alone does not say it.
    untagged = inspect("--data", corpus / "test.jsonl", "--by", "language")
    assert layers(untagged, 1)[0]["tokens"] == layers(folder)[0]["tokens"] - 5
    tagged = inspect("--data", corpus / "test.jsonl", "--by", "language", "--tag", "de")
    assert layers(tagged, 1) == layers(folder)


def test_several_data_are_groups(corpus: Path, inspect: Callable[..., dict[str, Any]]) -> None:
    both = inspect("--data", corpus, "--source", "en", "--target", "de", "--data", corpus, "--target", "fr")
    assert [group["name"] for group in both["groups"]] == ["all data", "test en-de", "test en-fr"]
    assert layers(both, 1) == layers(inspect("--data", corpus, "--source", "en", "--target", "de"))
    assert layers(both, 2) == layers(inspect("--data", corpus, "--source", "en", "--target", "fr"))
    assert both["groups"][0]["examples"] == 10
    mixed = inspect(
        "--data", corpus / "test.jsonl", "--data", corpus, "--source", "en", "--target", "de", "--tag", "fr"
    )
    assert [group["name"] for group in mixed["groups"]] == ["all data", "test.jsonl", "test en-de"]


def test_what_is_printed(
    corpus: Path, inspect: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect("--data", corpus, "--source", "en", "--target", "de", "--data", corpus, "--target", "fr")
    output, error = capsys.readouterr()
    assert "MaxVio" in output
    assert "test en-fr" in output
    assert "experts.html" in output
    for layer in layers(report):
        dead = ", ".join(map(str, layer["dead_experts"]))
        warning = f"warning: {layer['stack']} layer {layer['layer']}: {len(layer['dead_experts'])} of 4"
        assert (warning in error) == bool(dead)


def test_dead_experts_are_warned_of(
    corpus: Path,
    inspect: Callable[..., dict[str, Any]],
    checkpoint: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    model = tiny_model(router_scoring="sigmoid", router_balancing="loss_free", **fields)
    # No token chooses an expert whose selection bias is this low.
    model.routers("decoder")[1].e_score_correction_bias[2] = -10.0
    model.save_pretrained(folder)
    report = inspect("--data", corpus, "--source", "en", "--target", "de", model=folder)
    assert layers(report)[3]["dead_experts"] == [2]
    assert layers(report)[3]["experts"][2] == {"by_information": [], "by_count": []}
    error = capsys.readouterr().err
    assert "warning: decoder layer 1: 1 of 4 experts are dead (2)" in error
    assert any("decoder layer 1: 1 of 4" in warning for warning in report["warnings"])


def test_without_targets_the_encoder_alone(
    corpus: Path, inspect: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect("--data", corpus / "test.en", "--tag", "de")
    assert {layer["stack"] for layer in layers(report)} == {"encoder"}
    both = inspect("--data", corpus, "--source", "en", "--target", "de")
    assert_same_layers(layers(report), layers(both)[:2])
    error = capsys.readouterr().err
    assert "no targets for test.en, so the encoder alone is shown" in error
    assert any("no targets for test.en" in note for note in report["notes"])


def test_a_missing_tag_is_pointed_out(
    corpus: Path, inspect: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    inspect("--data", corpus / "test.jsonl")
    assert "no language tag before the sources of test.jsonl, but the tokenizer has <2de>, <2fr>" in (
        capsys.readouterr().err
    )
    inspect("--data", corpus / "test.jsonl", "--tag", "fr")
    assert "language tag" not in capsys.readouterr().err


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_stack(stack: str, corpus: Path, inspect: Callable[..., dict[str, Any]]) -> None:
    data = ("--data", corpus, "--source", "en", "--target", "de")
    expected = [layer for layer in layers(inspect(*data)) if layer["stack"] == stack]
    assert_same_layers(layers(inspect(*data, "--stack", stack)), expected)


def test_an_encoder_model(
    corpus: Path, inspect: Callable[..., dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "encoder"
    SparseqEncoderModel.from_pretrained(checkpoint).save_pretrained(folder)
    shutil.copy(checkpoint / "tokenizer.json", folder)
    shutil.copy(checkpoint / "tokenizer_config.json", folder)
    data = ("--data", corpus, "--source", "en", "--target", "de")
    assert_same_layers(layers(inspect(*data, model=folder)), layers(inspect(*data))[:2])


def test_limits(corpus: Path, inspect: Callable[..., dict[str, Any]]) -> None:
    report = inspect(
        "--data",
        corpus / "test.jsonl",
        "--by",
        "language",
        "--max-examples",
        3,
        "--top-tokens",
        2,
        "--batch-tokens",
        9,
    )
    assert [group["examples"] for group in report["groups"]] == [6, 3, 3]
    counts = {len(expert["by_count"]) for layer in layers(report) for expert in layer["experts"]}
    assert max(counts) == 2


def test_files_go_beside_the_model(
    corpus: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my-model"
    shutil.copytree(checkpoint, folder)
    assert main(["inspect", "experts", str(folder), "--data", str(corpus / "test.en")]) == 0
    names = ["experts.html", "experts.json", "experts.png"]
    assert sorted(path.name for path in (folder / "inspection").iterdir()) == names
    assert str(tmp_path) not in (folder / "inspection/experts.json").read_text("utf-8"), "no path of this machine"
    assert str(tmp_path) not in (folder / "inspection/experts.html").read_text("utf-8")
    assert str(folder / "inspection" / "experts.html") in capsys.readouterr().out


def test_without_matplotlib(
    corpus: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    output = tmp_path / "out"
    data = str(corpus / "test.en")
    assert main(["inspect", "experts", str(checkpoint), "--data", data, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["experts.html", "experts.json"]
    assert 'pip install "sparseq[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{corpus}/none.en"], "none.en: there is no such file or folder"),
        (["--data", "{corpus}/test.en", "--target", "{corpus}/none.de"], "none.de: there is no such file"),
        (["--data", "{corpus}/test.en", "--target", "{corpus}/short.de"], "has 5 lines and"),
        (["--data", "{corpus}"], "name the language to read with --source"),
        (["--data", "{corpus}", "--source", "it"], "no test.it"),
        (["--data", "{corpus}/test.jsonl", "--source-column", "text"], "Its columns: source, target, language"),
        (["--data", "{corpus}/test.jsonl", "--target-column", "text"], "--target-column text"),
        (["--data", "{corpus}/test.jsonl", "--by", "domain"], "--by domain"),
        (["--data", "{corpus}/test.jsonl", "--tag-column", "to"], "--tag-column to"),
        (["--data", "{corpus}/test.jsonl", "--tag", "it"], "no tag for the language 'it'; its language tags: <2de>"),
        (["--data", "{corpus}/test.jsonl", "--target", "x"], "--target belongs to a folder or a plain text"),
        (["--data", "{corpus}/test.jsonl", "--split", "x"], "--split belongs to a folder as --data"),
        (["--data", "{corpus}/test.en", "--by", "x"], "--by belongs to a table as --data"),
        (["--data", "{corpus}/test.en", "--tag", "de", "--tag", "fr"], "--tag was given 2 times for 1 --data"),
        (["--data", "{corpus}/empty.en"], "empty.en: there is nothing to look at"),
        (["--data", "{corpus}/test.en", "--stack", "decoder"], "no targets for test.en"),
        (["--data", "{corpus}/test.en", "--max-examples", "-1"], "--max-examples must be at least 0, but is -1"),
        (["--data", "{corpus}/test.en", "--top-tokens", "0"], "--top-tokens must be at least 1, but is 0"),
        (["--data", "{corpus}/test.en", "--batch-tokens", "0"], "--batch-tokens must be at least 1, but is 0"),
        (["--data", "{corpus}/test.en", "--device", "abacus"], "--device abacus cannot be used"),
        (["--data", "{corpus}/test.en", "--output", "{corpus}/test.en"], "File exists"),
    ],
)
def test_mistakes_are_named_before_the_weights_are_loaded(
    arguments: list[str],
    message: str,
    corpus: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    (corpus / "short.de").write_text("Ein\n", "utf-8")
    (corpus / "empty.en").write_text("", "utf-8")
    fails(checkpoint, *(argument.format(corpus=corpus) for argument in arguments))
    error = capsys.readouterr().err
    assert error.startswith("sparseq: error: ")
    assert message in error
    assert not (checkpoint / "inspection").exists()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (tiny_config(num_experts=0), [], "is a dense model (its `num_experts` is 0)"),
        (MarianConfig(), [], "is a model of type 'marian'"),
        (tiny_config(decoder_sparse_step=0), ["--stack", "decoder"], "`decoder_sparse_step` makes it dense"),
        (tiny_config(encoder_sparse_step=0), ["--stack", "encoder"], "`encoder_sparse_step` makes it dense"),
        (tiny_config(encoder_sparse_step=0), [], "no targets for test.en, but the experts to show are in the decoder"),
        (
            tiny_config(architectures=["SparseqEncoderModel"]),
            ["--stack", "decoder"],
            "because it is an encoder alone",
        ),
    ],
)
def test_models_without_the_experts_asked_for(
    config: SparseqConfig,
    arguments: list[str],
    message: str,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.save_pretrained(tmp_path / "model")
    fails(tmp_path / "model", "--data", corpus / "test.en", *arguments)
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(tmp_path / "nothing", "--data", corpus / "test.en")
    first, *rest = capsys.readouterr().err.splitlines()
    assert "nothing, and no model of that name could be read from the Hub" in first
    assert len(rest) == 1, "one line, and the hint about --debug"


def test_debug_may_stand_at_the_end(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.en"):
        main(["inspect", "experts", str(checkpoint), "--data", str(tmp_path / "none.en"), "--debug"])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["inspect", "experts", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    for option in ("--by", "--tag-column", "--source-column", "--max-examples", "--top-tokens", "--output", "--stack"):
        assert option in text
    assert "--debug" not in text
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["inspect"])
    assert "SUBJECT" in capsys.readouterr().err
