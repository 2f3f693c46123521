"""Each metric's figures: those of the package that defines it, or worked by hand; and what its signature says."""

import sys
from importlib import metadata

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

import sparseq
from sparseq.metrics.corpus import METRICS, Bleu, Chrf, CorpusMetric, ExactMatch, Rouge, check_metric

PREDICTIONS = ["The cat sat on the mat.", "A dog runs fast", "Two men play chess in the park.", ""]
REFERENCES = [
    ["The cat sat on a mat.", "A cat was sitting on the mat."],
    ["A dog runs quickly.", "A dog is running fast"],
    ["Two men are playing chess in the park.", "Two men play chess."],
    ["Nothing.", "Empty."],
]


def score(metric: CorpusMetric, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    return metric.scores(metric.statistics(predictions, references).sum(axis=0))


def test_several_references_as_sacrebleu_counts_them() -> None:
    documents = [list(document) for document in zip(*REFERENCES, strict=True)]
    bleu, chrf = sacrebleu.BLEU(lowercase=True), sacrebleu.CHRF(word_order=2)
    assert score(Bleu(lowercase=True), PREDICTIONS, REFERENCES)["bleu"] == pytest.approx(
        bleu.corpus_score(PREDICTIONS, documents).score
    )
    assert score(Chrf(word_order=2), PREDICTIONS, REFERENCES)["chrf"] == pytest.approx(
        chrf.corpus_score(PREDICTIONS, documents).score
    )
    assert Bleu(lowercase=True).signature(2) == str(bleu.get_signature())
    assert Chrf(word_order=2).signature(2) == str(chrf.get_signature())


def test_a_varying_number_of_references() -> None:
    references = [REFERENCES[0], *[some[:1] for some in REFERENCES[1:]]]
    documents = [[some[0] for some in references], [REFERENCES[0][1], None, None, None]]
    expected = sacrebleu.BLEU()
    assert score(Bleu(), PREDICTIONS, references)["bleu"] == pytest.approx(
        expected.corpus_score(PREDICTIONS, documents).score
    )
    assert Bleu().signature(-1) == str(expected.get_signature())
    assert Bleu().signature(-1).startswith("nrefs:var|")


def test_details_of_bleu() -> None:
    metric = Bleu(tokenize="none")
    details = metric.details(metric.statistics(["a b c"], [["a b c d"]]).sum(axis=0))
    assert details == pytest.approx({"brevity_penalty": np.exp(1 - 4 / 3), "length_ratio": 3 / 4})


def test_exact_match_counts_texts_equal_to_a_reference() -> None:
    predictions = ["a b", " a b ", "A b", "a  b", "c"]
    references = [["a b"], ["a b"], ["a b"], ["a b"], ["b", "c"]]
    assert score(ExactMatch(), predictions, references) == {"exact_match": 60.0}
    assert score(ExactMatch(lowercase=True), predictions, references) == {"exact_match": 80.0}
    version = f"package:sparseq|version:{sparseq.__version__}"
    assert ExactMatch().signature(1) == f"nrefs:1|case:mixed|space:stripped|{version}"
    assert ExactMatch(lowercase=True).signature(2) == f"nrefs:2|case:lc|space:stripped|{version}"


def test_rouge_of_a_worked_example() -> None:
    # Five words against four: three in common, in order; of four and three pairs, two in common.
    figures = score(Rouge(), ["the cat sat down here"], [["the cat sat there"]])
    assert figures["rouge1"] == pytest.approx(100 * 2 * 3 / (5 + 4))
    assert figures["rouge2"] == pytest.approx(100 * 2 * 2 / (4 + 3))
    assert figures["rougeL"] == pytest.approx(100 * 2 * 3 / (5 + 4))


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_the_mean_of_the_best_references(stemmer: bool) -> None:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=stemmer)
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    expected = {
        kind: 100 * np.mean([max(scorer.score(r, p)[kind].fmeasure for r in some) for p, some in pairs])
        for kind in kinds
    }
    assert score(Rouge(stemmer=stemmer), PREDICTIONS, REFERENCES) == pytest.approx(expected)


def test_the_stemmer_matters() -> None:
    plain, stemmed = (score(Rouge(stemmer=stemmer), ["running dogs"], [["run dog"]]) for stemmer in (False, True))
    assert plain["rouge1"] == 0
    assert stemmed["rouge1"] == 100


def test_lines_are_sentences_for_rouge_lsum_alone() -> None:
    # The two sentences are exchanged: line by line everything is found, in one sequence only half of it.
    figures = score(Rouge(), ["a b c\nd e f"], [["d e f\na b c"]])
    assert figures["rougeLsum"] == pytest.approx(100)
    assert figures["rougeL"] == pytest.approx(50)


def test_rouge_of_other_scripts() -> None:
    predictions, references = ["Кошка сидит.", "为什么"], [["Кошка спит."], ["为什么"]]
    with pytest.warns(UserWarning, match="2 of 2 references hold no ASCII letter"):
        assert score(Rouge(), predictions, references)["rouge1"] == 0
    # "Кошка" and the full stop of three words, and the whole second text.
    figures = score(Rouge(tokenize="intl"), predictions, references)
    assert figures["rouge1"] == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_signatures_of_rouge_say_what_was_done() -> None:
    version = f"measure:f1|package:rouge-score|version:{metadata.version('rouge-score')}"
    assert Rouge().signature(1) == f"nrefs:1|case:lc|tok:ascii|stem:no|{version}"
    signature = Rouge(stemmer=True).signature(1, bootstrap=100, seed=7)
    assert signature == f"nrefs:1|bs:100|seed:7|case:lc|tok:ascii|stem:porter|{version}"
    assert "|tok:zh|" in Rouge(tokenize="zh").signature(1)


def test_metrics_are_listed_under_their_names() -> None:
    assert list(METRICS) == ["bleu", "chrf", "exact_match", "rouge"]
    for name, metric in METRICS.items():
        check_metric(name)
        assert set(score(metric(), ["a"], [["a"]])) == set(metric().figures)


@pytest.mark.parametrize(
    ("name", "hint"), [("blue", "'bleu'"), ("exact-match", "'exact_match'"), ("ROUGE", "'rouge'")]
)
def test_an_unknown_metric_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"no metric '{name}'. Did you mean {hint}\? The metrics are bleu, chrf"):
        check_metric(name)


def test_a_name_unlike_any_metric() -> None:
    with pytest.raises(ValueError, match=r"no metric 'xyzzy'\. The metrics are"):
        check_metric("xyzzy")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"`tokenize` must be one of .* but is 'moses'"):
        Bleu(tokenize="moses")
    with pytest.raises(ValueError, match=r"`tokenize` must be one of .*ascii.* but is 'moses'"):
        Rouge(tokenize="moses")
    with pytest.raises(ValueError, match="`word_order` must be 0"):
        Chrf(word_order=-1)
    with pytest.raises(ValueError, match=r"`kinds` must be some of rouge1.* but is \['rouge7'\]"):
        Rouge(kinds=["rouge7"])
    with pytest.raises(ValueError, match="`stemmer` works on the words of tokenize='ascii' only"):
        Rouge(stemmer=True, tokenize="intl")


def test_a_tokenizer_that_cannot_run_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("\nJapanese needs more.\n\n    pip install sacrebleu[ja]\n")

    monkeypatch.setattr("sacrebleu.metrics.bleu._get_tokenizer", fail)
    with pytest.raises(ValueError, match=r"'ja-mecab' cannot be used here: Japanese needs more\. pip install"):
        Bleu(tokenize="ja-mecab")


def test_a_missing_rouge_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="rouge_score"):
        Rouge()
