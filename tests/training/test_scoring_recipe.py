"""The section scoring of a recipe: what is measured, how, and what is refused before anything is read."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseq.cli import main
from sparseq.metrics.corpus import METRICS, Bleu, Chrf, ExactMatch, Rouge, make_metrics
from sparseq.metrics.scoring import score_predictions
from sparseq.training.recipes import Recipe, build_recipe, load_recipe
from sparseq.training.run import train
from sparseq.training.sections import METRIC_FIGURES, ScoringRecipe
from tests.training.toy import toy_recipe

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


def scored_recipe(corpus: Path, scoring: dict[str, Any], **training: Any) -> Recipe:
    tree = toy_recipe(corpus).to_dict()
    return build_recipe("toy", {**tree, "training": {**tree["training"], **training}, "scoring": scoring})


def test_a_recipe_knows_the_figures_of_all_metrics() -> None:
    metrics = ScoringRecipe(metrics=list(METRICS)).make()
    assert {metric.name: list(metric.figures) for metric in metrics} == {
        name: list(labels) for name, labels in METRIC_FIGURES.items()
    }


def test_every_option_reaches_its_metrics() -> None:
    options = {"tokenize": "char", "lowercase": True, "rouge_stemmer": True}
    made = make_metrics([*METRICS, "bleu"], **options)
    kinds = ["rouge1", "rouge2", "rougeL"]
    same = [Bleu(tokenize="char", lowercase=True), Chrf(lowercase=True), ExactMatch(lowercase=True)]
    expected = [*same, Rouge(kinds=kinds, stemmer=True)]
    assert [metric.signature(1) for metric in made] == [metric.signature(1) for metric in expected]
    assert "tok:zh" in make_metrics(["rouge"], rouge_tokenize="zh")[0].signature(1)


@pytest.mark.parametrize("figure", [figure for labels in METRIC_FIGURES.values() for figure in labels])
def test_a_figure_depends_on_the_options_that_are_named_and_no_others(figure: str) -> None:
    predictions, references = (
        ["The Cats walking, here", "dogs (ran) Home"],
        ["the cat walks , here", "dogs (ran) home"],
    )

    def value(**options: Any) -> float:
        metrics = ScoringRecipe(metrics=list(METRICS), **options).make()
        return score_predictions(predictions, references, metrics).scores[figure]

    changes = {"tokenize": "none", "lowercase": True, "rouge_stemmer": True, "rouge_tokenize": "intl"}
    decisive = {name for name, change in changes.items() if value(**{name: change}) != value()}
    assert decisive == set(ScoringRecipe().options_of(figure))


def test_results_have_all_figures_with_signatures_and_intervals(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"metrics": ["exact_match", "rouge", "bleu"], "tokenize": "none", "rouge_tokenize": "intl"}
    recipe = scored_recipe(corpus, changes, max_steps=3, metric="rougeL", eval_steps=3)
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe.to_dict()))
    out = tmp_path / "out"
    assert main(["train", str(tmp_path / "toy.yaml"), "--output", str(out), "--bootstrap", "10"]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    outputs, references = (
        path.read_text(encoding="utf-8").splitlines() for path in (out / "test.de.translated", corpus / "test.de")
    )
    metrics = [ExactMatch(), Rouge(kinds=["rouge1", "rouge2", "rougeL"], tokenize="intl"), Bleu(tokenize="none")]
    assert results["scores"] == score_predictions(outputs, references, metrics, bootstrap=10).report()
    evaluated = next(entry for entry in results["log"] if "eval_rougeL" in entry)
    assert {"eval_rouge1", "eval_rouge2", "eval_bleu", "eval_exact_match"} <= evaluated.keys()
    assert "eval_chrf" not in evaluated
    shown = capsys.readouterr().out
    scores = results["scores"]
    assert f"BLEU {scores['bleu']:.2f} +- {scores['bleu_ci']:.2f}  ({scores['bleu_signature']})" in shown
    assert f"ROUGE-L {scores['rougeL']:.2f} +- {scores['rougeL_ci']:.2f}  ({scores['rouge_signature']})" in shown
    assert "chrF" not in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.metric=rougeL"],
            r"`training\.metric` is rougeL, but `scoring\.metrics` has no rouge; set "
            r'"scoring\.metrics=\[bleu, chrf, rouge\]"',
        ),
        (["training.metric=chrf", "scoring.metrics=[bleu]"], r"no chrf; set \"scoring\.metrics=\[bleu, chrf\]\""),
        (["scoring.metrics=[bleu, rogue]"], r"no metric `rogue` \(did you mean `rouge`\?\)"),
        (["scoring.metrics=[]"], "`metrics` is empty"),
        (["scoring.metrics=rouge"], "metrics.*list"),
        (["training.metric=rouge"], "metric.*rouge"),
        (["scoring.stemmer=true"], r"no key `stemmer` \(did you mean `rouge_stemmer`\?\)"),
    ],
)
def test_mistakes_are_named_when_the_recipe_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny-sparse", overrides)


def test_the_way_out_is_one() -> None:
    recipe = load_recipe("tiny-sparse", ["training.metric=rougeL", "scoring.metrics=[bleu, chrf, rouge]"])
    assert recipe.scoring.metrics == ["bleu", "chrf", "rouge"]


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"tokenize": "moses"}, "but is 'moses'"),
        ({"metrics": ["rouge"], "rouge_tokenize": "intl", "rouge_stemmer": True}, "`stemmer` works on the words of"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    corpus: Path, tmp_path: Path, scoring: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = scored_recipe(corpus, scoring)
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "out", progress=False)
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe.to_dict()))
    assert main(["train", str(tmp_path / "toy.yaml"), "--dry-run"]) == 2
    assert "sparseq: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_resample_is_refused_before_anything_is_read(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 resamples, but is 1"):
        train(toy_recipe(corpus), tmp_path / "out", progress=False, bootstrap=1)
    assert not (tmp_path / "out").exists()


def test_a_missing_rouge_package_is_noticed_before_anything_is_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    recipe = scored_recipe(corpus, {"metrics": ["rouge"]})
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe.to_dict()))
    assert main(["train", str(tmp_path / "toy.yaml"), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "needs the package rouge_score" in message
    assert 'pip install "sparseq[eval]"' in message
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_other_metrics_unless_they_judge_it(corpus: Path, tmp_path: Path) -> None:
    first = train(toy_recipe(corpus, max_steps=3), tmp_path / "loss", progress=False)
    changed = {"metrics": ["chrf", "rouge"], "lowercase": True}
    again = train(scored_recipe(corpus, changed, max_steps=3), tmp_path / "loss", progress=False)
    assert (again.steps, again.translations) == (3, first.translations)
    assert again.scores.keys() >= {"chrf", "rougeL"}

    train(toy_recipe(corpus, max_steps=3, metric="chrf"), tmp_path / "chrf", progress=False)
    # What the run's figure does not depend on may change, in a recipe of an earlier version too.
    note = tmp_path / "chrf" / "recipe.json"
    old = json.loads(note.read_text())
    del old["scoring"]
    note.write_text(json.dumps(old))
    free = {"metrics": ["chrf", "bleu", "exact_match"], "tokenize": "none"}
    train(scored_recipe(corpus, free, max_steps=3, metric="chrf"), tmp_path / "chrf", progress=False)
    with pytest.raises(ValueError, match=r"scoring\.lowercase was False, is True.*--no-resume"):
        train(
            scored_recipe(corpus, {"lowercase": True}, max_steps=3, metric="chrf"), tmp_path / "chrf", progress=False
        )
