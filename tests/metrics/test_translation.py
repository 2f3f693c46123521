"""BLEU and chrF: sacrebleu's figures with the settings asked for, and the signature that says so."""

import math

import pytest
import sacrebleu

from sparseq.metrics import translation_scores

HYPOTHESES = ["The cat sat on the mat.", "A dog runs fast", "Two men play chess in the park."] * 5
REFERENCES = ["The cat sat on a mat.", "A dog runs quickly.", "Two men are playing chess in the park."] * 5


def test_scores_are_those_of_sacrebleu() -> None:
    scores = translation_scores(HYPOTHESES, REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert scores["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert scores["sentences"] == 15


def test_bleu_of_a_worked_example() -> None:
    # Ten words of which the last is wrong: it spoils one n-gram of every order.
    scores = translation_scores(["a b c d e f g h i x"], ["a b c d e f g h i j"], tokenize="none")
    expected = 100 * math.exp(sum(math.log(p) for p in (9 / 10, 8 / 9, 7 / 8, 6 / 7)) / 4)
    assert scores["bleu"] == pytest.approx(expected)


def test_tokenisation_and_case_are_settings_that_the_signature_shows() -> None:
    strict = translation_scores(["a cat sat here , today"], ["A cat sat here, today"], tokenize="none")
    loose = translation_scores(["a cat sat here, today"], ["A cat sat here, today"], lowercase=True)
    assert strict["bleu"] < 60
    assert loose["bleu"] == pytest.approx(100)
    assert "tok:none" in strict["bleu_signature"]
    assert "case:lc" in loose["bleu_signature"]


def test_intervals_are_reproducible_and_near_those_of_sacrebleu() -> None:
    hypotheses = [f"{h} {i % 7} {'right' if i % 3 else 'wrong'}" for i, h in enumerate(HYPOTHESES * 4)]
    references = [f"{r} {i % 7} right" for i, r in enumerate(REFERENCES * 4)]
    plain = translation_scores(hypotheses, references)
    first = translation_scores(hypotheses, references, bootstrap=200, seed=1)
    again = translation_scores(hypotheses, references, bootstrap=200, seed=1)
    other = translation_scores(hypotheses, references, bootstrap=200, seed=2)
    assert first == again
    assert first["bleu_ci"] != other["bleu_ci"]
    assert 0 < first["bleu_ci"] < 10
    assert first["bleu"] == plain["bleu"]
    assert "bs:200|seed:1" in first["bleu_signature"]
    assert "bleu_ci" not in plain
    theirs = sacrebleu.BLEU().corpus_score(hypotheses, [references], n_bootstrap=1000)
    ours = translation_scores(hypotheses, references, bootstrap=1000)
    assert ours["bleu_ci"] == pytest.approx(theirs._ci, rel=0.1)


def test_an_interval_exists_where_resamples_score_nothing() -> None:
    scores = translation_scores(["a b c d e", *["x"] * 9], ["a b c d e", *["y z"] * 9], bootstrap=100)
    assert scores["bleu_ci"] > 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="2 hypotheses but 1 references"):
        translation_scores(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        translation_scores([], [])
    with pytest.raises(ValueError, match="'moses'"):
        translation_scores(["a"], ["a"], tokenize="moses")
    with pytest.raises(ValueError, match="`bootstrap`"):
        translation_scores(["a"], ["a"], bootstrap=1)
