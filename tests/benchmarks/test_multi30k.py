"""The driver of the runs on Multi30k: the recipes it makes, what it resumes, and the scores it reports."""

import gzip
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import yaml

from sparseq.data.lines import read_lines
from sparseq.training.recipes import load_recipe
from tests.training.toy import toy_recipe, write_corpus


@pytest.fixture
def multi30k() -> Any:
    return importlib.import_module("multi30k")


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """The toy corpus under the names of the tokenised captions."""
    folder = tmp_path / "captions"
    write_corpus(folder)
    for split, name in (("train", "train"), ("val", "val"), ("test", "test_2016_flickr")):
        for language in ("en", "de"):
            (folder / f"{split}.{language}").rename(folder / f"{name}.lc.norm.tok.{language}")
    return folder


def call(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def test_the_paper_s_arm_is_the_recipe_on_the_tokenised_text(multi30k: Any) -> None:
    made = multi30k.arm_recipe(multi30k.ARMS["paper"], Path("captions"), "fr", 3)
    typed = [
        *("data.folder=captions", "data.source=en", "data.target=fr", "data.train=train.lc.norm.tok", "seed=3"),
        *("data.validation=val.lc.norm.tok", "data.test=test_2016_flickr.lc.norm.tok"),
    ]
    assert made == load_recipe("transformer-tiny-2021", typed)


def test_several_processes_make_the_updates_of_one(multi30k: Any) -> None:
    def batches(arm: str, processes: int) -> int:
        made = multi30k.arm_recipe(multi30k.ARMS[arm], Path("captions"), "fr", 1, Path("start"), processes=processes)
        return int(made.training.gradient_accumulation_steps * processes)

    assert [batches("paper", processes) for processes in (1, 2)] == [2, 2]
    with pytest.raises(SystemExit, match="2 batches an update, which 3 processes cannot share"):
        batches("paper", 3)
    # One batch cannot be shared: these grow with the processes, which docs/results.md says of them.
    assert [batches("joint", processes) for processes in (1, 2)] == [1, 2]


def test_every_arm_s_recipe_holds_and_no_two_share_a_folder(multi30k: Any) -> None:
    recipes = [
        multi30k.arm_recipe(arm, Path("captions"), "de", 1, Path("pretrained")).to_dict()
        for arm in multi30k.ARMS.values()
    ]
    assert recipes[0] != recipes[1]
    assert len({arm.folder for arm in multi30k.ARMS.values()}) == len(multi30k.ARMS)
    starts = [recipe["start"]["checkpoint"] for recipe in recipes if "start" in recipe]
    assert starts == ["pretrained"] * 6


def test_an_arm_that_goes_on_from_a_model_asks_for_it(
    multi30k: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"arm pretrained .* --start"):
        call(multi30k, monkeypatch, "run", tmp_path, tmp_path / "runs", "--arms", "paper", "pretrained")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("language", "tokenised", "plain"),
    [
        ("fr", "un chien court sur l&apos; herbe qu&apos; il aime .", "un chien court sur l'herbe qu'il aime."),
        ("de", "sie sagt : &quot; komm &quot; , im t-shirt .", 'sie sagt: "komm", im t-shirt.'),
        ("de", "schwarz &amp; weiß ( beide )", "schwarz & weiß (beide)"),
        ("de", "", ""),
    ],
)
def test_detokenised_text_is_as_people_write_it(multi30k: Any, language: str, tokenised: str, plain: str) -> None:
    assert multi30k.detokenize([tokenised], language) == [plain]


def test_scores_are_sacrebleu_s_on_tokenised_and_on_detokenised_text(multi30k: Any) -> None:
    translations = ["un chien court sur l&apos; herbe .", "deux hommes ( assis ) d&apos; ici ."]
    references = ["un chien court vite sur l&apos; herbe .", "deux hommes ( assis ) d&apos; un banc ."]
    scores = multi30k.score(translations, references, "fr")
    plain = [
        ["un chien court sur l'herbe.", "deux hommes (assis) d'ici."],
        ["un chien court vite sur l'herbe.", "deux hommes (assis) d'un banc."],
    ]
    expected = {
        ("tokenised", "bleu"): sacrebleu.corpus_bleu(translations, [references], tokenize="none").score,
        ("detokenised", "bleu"): sacrebleu.corpus_bleu(plain[0], [plain[1]]).score,
        ("detokenised", "chrf"): sacrebleu.corpus_chrf(plain[0], [plain[1]]).score,
    }
    assert {key: scores[key[0]][key[1]] for key in expected} == pytest.approx(expected)
    assert "tok:none" in scores["tokenised"]["bleu_signature"]
    assert "tok:13a" in scores["detokenised"]["bleu_signature"]


def test_runs_resume_and_are_scored_before_and_after_their_end(
    multi30k: Any, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = toy_recipe(captions, max_steps=9).to_dict()
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    monkeypatch.setattr(multi30k, "ARMS", {"toy": multi30k.Arm("toy-arm", str(tmp_path / "toy.yaml"))})
    runs, output = tmp_path / "runs", tmp_path / "figures.json"
    train = ("run", captions, runs, "--targets", "de", "--seeds", "1", "2")
    call(multi30k, monkeypatch, *train)

    def report(*options: str) -> dict[str, Any]:
        call(multi30k, monkeypatch, "report", runs, "--json", output, *options)
        content: dict[str, Any] = json.loads(output.read_text("utf-8"))
        return content

    finished = report()
    first, second = finished["runs"]
    results = [json.loads((runs / f"toy-arm-de-{seed}" / "results.json").read_text("utf-8")) for seed in (1, 2)]
    assert [run["validation_loss"] for run in (first, second)] == [one["validation_loss"] for one in results]
    assert [run["parameters"] for run in (first, second)] == [one["parameters"] for one in results]
    (mean,) = finished["means"]
    assert mean["validation_loss"] == pytest.approx(sum(one["validation_loss"] for one in results) / 2)
    assert mean["seeds"] == [1, 2]
    # Validation after update 5 and at the end; the mean of the checkpoints is no point of the curve.
    assert list(first["validation_losses"]) == ["5", "9"]
    validation = report("--split", "val")
    assert validation["published"] == {}
    assert validation["runs"][0]["detokenised"]["chrf"] != first["detokenised"]["chrf"]

    # What the first run was before its last moment: three checkpoints, whose mean became its weights.
    folder = runs / "toy-arm-de-1"
    for path in [folder / "model.safetensors", folder / "results.json"]:
        path.unlink()
    assert [run["seed"] for run in report()["runs"]] == [2]
    early = report("--unfinished")["runs"][0]
    assert (early["finished"], early["updates"], early["averaged_updates"]) == (False, 9, [3, 6, 9])
    assert early["tokenised"] == first["tokenised"]
    assert early["detokenised"] == first["detokenised"]
    # With its last checkpoint gone it is an earlier run, which `run` brings to the same end.
    shutil.rmtree(folder / "checkpoints" / "checkpoint-9")
    earlier = report("--unfinished")["runs"][0]
    assert (earlier["updates"], earlier["averaged_updates"]) == (6, [3, 6])
    before = (runs / "toy-arm-de-2" / "results.json").stat().st_mtime_ns
    call(multi30k, monkeypatch, *train)
    assert report()["runs"][0]["tokenised"] == first["tokenised"]
    assert (runs / "toy-arm-de-2" / "results.json").stat().st_mtime_ns == before


def test_the_published_figures_stand_beside_the_test_set_only(multi30k: Any) -> None:
    scores = {"tokenised": {"bleu": 40.0, "bleu_ci": 1.5}, "detokenised": {"bleu": 39.0, "chrf": 60.0}}
    row = {"arm": "paper", "target": "fr", "seed": 1, "finished": False, "updates": 2350, "max_updates": 8000}
    row |= {**scores, "validation_loss": None}
    header, cells, *published = multi30k.score_rows([row], [], published=True)
    assert len(header) == len(cells)
    assert cells == ("paper, fr, seed 1", "2,350 of 8,000", "40.00 ± 1.50", "39.00", "60.00", "")
    assert [one[2] for one in published] == ["61.80", "63.71"]
    assert len(multi30k.score_rows([row], [], published=False)) == 2


def test_captions_are_tokenised_as_the_data_set_is(
    multi30k: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.en.gz").write_bytes(gzip.compress(b'A man\'s "dog", in a blond-haired crowd.\n\nR&B!\n'))
    (tmp_path / "c.de").write_text("Ein Mädchen steht im „Wasser“\n", encoding="utf-8")
    call(multi30k, monkeypatch, "captions", tmp_path / "c.en.gz", tmp_path / "c.de", tmp_path / "tok")
    english = (tmp_path / "tok" / "c.lc.norm.tok.en").read_text("utf-8")
    assert english == "a man &apos;s &quot; dog , &quot; in a blond-haired crowd .\n\nr & b !\n".replace(
        "& b", "&amp; b"
    )
    german = (tmp_path / "tok" / "c.lc.norm.tok.de").read_text("utf-8")
    assert german == "ein mädchen steht im &quot; wasser &quot;\n"
    with pytest.raises(SystemExit, match="captions must be named"):
        call(multi30k, monkeypatch, "captions", tmp_path / "captions", tmp_path / "tok")


@pytest.mark.skipif("SPARSEQ_DATA" not in os.environ, reason="needs the folder of Multi30k's captions")
@pytest.mark.parametrize("language", ["en", "de", "fr"])
def test_the_raw_text_becomes_the_tokenised_text(multi30k: Any, language: str) -> None:
    folder = Path(os.environ["SPARSEQ_DATA"])
    raw, tokenised = folder / "parallel", folder / "parallel_tok"
    made = multi30k.tokenize(read_lines(raw / f"val.{language}.gz"), language)
    theirs = read_lines(tokenised / f"val.lc.norm.tok.{language}.gz")
    different = [pair for pair in zip(made, theirs, strict=True) if pair[0] != pair[1]]
    # Quotation marks that their version of the normaliser treated otherwise.
    assert len(different) <= {"en": 0, "de": 1, "fr": 1}[language], different
    assert all("&quot;" in theirs or "&apos;" in theirs for _, theirs in different)
