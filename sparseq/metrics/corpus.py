"""Corpus metrics as functions of statistics that add up over sentences.

A metric reads each sentence once; the scores of any test set drawn from those sentences, a bootstrap resample for
instance, then follow from a sum.
"""

import difflib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.base import Signature
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

import sparseq

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""What ROUGE can report: common words, pairs of words, longest common subsequence of the text, and of its lines."""

_ASCII_WORD = re.compile(r"[a-z0-9]")


class CorpusMetric(ABC):
    """One metric with its options.

    Attributes:
        name: The metric's name.
        figures: Names of the figures that `scores` returns.
    """

    name: ClassVar[str]
    figures: tuple[str, ...]

    @abstractmethod
    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Statistics of each sentence, (sentences, statistics); `references[i]` are those of `predictions[i]`."""

    @abstractmethod
    def scores(self, totals: NDArray[np.float64]) -> dict[str, float]:
        """Each figure, from 0 to 100, for a test set whose statistics sum up to `totals`, (statistics,)."""

    def details(self, totals: NDArray[np.float64]) -> dict[str, float]:
        """What else is worth reporting of a test set."""
        return {}

    @abstractmethod
    def signature(self, num_references: int, *, bootstrap: int = 0, seed: int | None = None) -> str:
        """Everything that the figures depend on, in the form of sacreBLEU's signatures (Post 2018).

        Args:
            num_references: References of a sentence; -1 where it varies.
            bootstrap: Resamples behind the intervals; 0 for none.
            seed: Seed of the resampling.
        """


class _SacrebleuMetric(CorpusMetric):
    """A metric that sacrebleu computes, signature included."""

    def __init__(self, metric: BLEU | CHRF) -> None:
        self.figures = (self.name,)
        self._metric = metric

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        # sacrebleu wants one document for each position in the list of references, None where a sentence has fewer.
        documents = list(zip_longest(*references))
        return np.asarray(self._metric._extract_corpus_statistics(list(predictions), documents), dtype=np.float64)

    def scores(self, totals: NDArray[np.float64]) -> dict[str, float]:
        return {self.name: float(self._metric._compute_score_from_stats(list(totals)).score)}

    def signature(self, num_references: int, *, bootstrap: int = 0, seed: int | None = None) -> str:
        self._metric.num_refs = num_references
        self._metric.n_bootstrap = bootstrap or None
        self._metric.seed = str(seed) if bootstrap else None
        return str(self._metric.get_signature())


class Bleu(_SacrebleuMetric):
    """BLEU (Papineni et al. 2002).

    Args:
        tokenize: sacrebleu's tokenizer: "13a" for plain text, "none" for text that is tokenised already, "zh",
            "intl", "char", ...
        lowercase: Ignore case.

    Raises:
        ValueError: `tokenize` is unknown, or needs a package that is missing.
    """

    name = "bleu"

    def __init__(self, *, tokenize: str = "13a", lowercase: bool = False) -> None:
        _check_tokenizer(tokenize, BLEU.TOKENIZERS)
        # `force` only silences sacrebleu's warning about text that looks tokenised.
        super().__init__(_with_tokenizer(tokenize, lowercase=lowercase, force=True))

    def details(self, totals: NDArray[np.float64]) -> dict[str, float]:
        score: Any = self._metric._compute_score_from_stats(list(totals))
        return {"brevity_penalty": float(score.bp), "length_ratio": float(score.ratio)}


class Chrf(_SacrebleuMetric):
    """chrF2 (Popović 2015), and chrF2++ (Popović 2017) with `word_order=2`.

    Args:
        lowercase: Ignore case.
        word_order: Longest n-gram of words that counts besides those of characters.

    Raises:
        ValueError: `word_order` is negative.
    """

    name = "chrf"

    def __init__(self, *, lowercase: bool = False, word_order: int = 0) -> None:
        if word_order < 0:
            raise ValueError(f"`word_order` must be 0 (chrF) or more (2 is chrF++), but is {word_order}.")
        super().__init__(CHRF(lowercase=lowercase, word_order=word_order))


class ExactMatch(CorpusMetric):
    """Share of predictions that equal a reference, white space around them aside.

    Args:
        lowercase: Ignore case.
    """

    name = "exact_match"

    def __init__(self, *, lowercase: bool = False) -> None:
        self.figures = (self.name,)
        self._lowercase = lowercase

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        matches = [
            self._normalise(prediction) in {self._normalise(reference) for reference in some}
            for prediction, some in zip(predictions, references, strict=True)
        ]
        return np.asarray([[match, 1] for match in matches], dtype=np.float64)

    def scores(self, totals: NDArray[np.float64]) -> dict[str, float]:
        return {self.name: float(100 * totals[0] / totals[1])}

    def signature(self, num_references: int, *, bootstrap: int = 0, seed: int | None = None) -> str:
        options = {"case": "lc" if self._lowercase else "mixed", "space": "stripped"}
        version = {"package": "sparseq", "version": sparseq.__version__}
        return _signature(num_references, bootstrap, seed, {**options, **version})

    def _normalise(self, text: str) -> str:
        return text.strip().lower() if self._lowercase else text.strip()


class Rouge(CorpusMetric):
    """ROUGE (Lin 2004): mean F1 of the texts, computed by rouge-score.

    Of several references the one with the highest F1 counts. Case is always ignored.

    Args:
        kinds: Which of `ROUGE_KINDS` to compute. "rougeLsum" takes each line of a text for a sentence; it equals
            "rougeL" where texts are single lines.
        stemmer: Strip English suffixes from words of four letters or more (Porter).
        tokenize: "ascii" is the original's: runs of ASCII letters and digits, everything else is white space. For
            languages with other letters, name one of sacrebleu's tokenizers, such as "intl", "zh" or "char"; then
            punctuation counts as words.

    Raises:
        ValueError: A kind or the tokenizer is unknown, or `stemmer` is asked for with another tokenizer.
        ModuleNotFoundError: rouge-score is not installed.
    """

    name = "rouge"

    def __init__(self, *, kinds: Sequence[str] = ROUGE_KINDS, stemmer: bool = False, tokenize: str = "ascii") -> None:
        if not kinds or not set(kinds) <= set(ROUGE_KINDS):
            raise ValueError(f"`kinds` must be some of {', '.join(ROUGE_KINDS)}, but is {list(kinds)}.")
        _check_tokenizer(tokenize, {"ascii", *BLEU.TOKENIZERS})
        if stemmer and tokenize != "ascii":
            raise ValueError(f"`stemmer` works on the words of tokenize='ascii' only, but `tokenize` is {tokenize!r}.")
        # Imported here: most users never need it, and it brings in nltk.
        from rouge_score.rouge_scorer import RougeScorer

        self.figures = tuple(kinds)
        self._stemmer, self._tokenize = stemmer, tokenize
        tokenizer = None if tokenize == "ascii" else _Words(tokenize)
        self._scorer = RougeScorer(list(kinds), use_stemmer=stemmer, tokenizer=tokenizer)

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        self._warn_of_other_scripts(references)
        rows = []
        for prediction, some in zip(predictions, references, strict=True):
            scores = self._scorer.score_multi(list(some), prediction)
            rows.append([*(scores[kind].fmeasure for kind in self.figures), 1])
        return np.asarray(rows, dtype=np.float64)

    def scores(self, totals: NDArray[np.float64]) -> dict[str, float]:
        return {kind: float(100 * total / totals[-1]) for kind, total in zip(self.figures, totals, strict=False)}

    def signature(self, num_references: int, *, bootstrap: int = 0, seed: int | None = None) -> str:
        options = {"case": "lc", "tok": self._tokenize, "stem": "porter" if self._stemmer else "no", "measure": "f1"}
        version = {"package": "rouge-score", "version": metadata.version("rouge-score")}
        return _signature(num_references, bootstrap, seed, {**options, **version})

    def _warn_of_other_scripts(self, references: Sequence[Sequence[str]]) -> None:
        if self._tokenize != "ascii":
            return
        texts = [text for some in references for text in some if text.strip()]
        lost = sum(not _ASCII_WORD.search(text.lower()) for text in texts)
        if lost:
            warnings.warn(
                f"{lost} of {len(texts)} references hold no ASCII letter or digit, so their ROUGE is 0: use one of "
                "sacrebleu's tokenizers, such as tokenize='intl' (`sparseq score --rouge-tokenize intl`, and "
                "scoring.rouge_tokenize=intl in a recipe).",
                stacklevel=3,
            )


class _Words:
    """A tokenizer of sacrebleu's as rouge-score wants it."""

    def __init__(self, name: str) -> None:
        self._tokenizer: Any = _with_tokenizer(name).tokenizer

    def tokenize(self, text: str) -> list[str]:
        """Lower-cased words."""
        words: list[str] = self._tokenizer(text.lower()).split()
        return words


class _Signature(Signature):
    """A signature in sacrebleu's form, with options and a version of another package."""

    def __init__(self, arguments: dict[str, Any], options: dict[str, str]) -> None:
        super().__init__(arguments)
        self.info.update(options)


METRICS: dict[str, type[CorpusMetric]] = {metric.name: metric for metric in (Bleu, Chrf, ExactMatch, Rouge)}
"""The metrics by name."""


def make_metrics(
    names: Sequence[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    rouge_stemmer: bool = False,
    rouge_tokenize: str = "ascii",
) -> list[CorpusMetric]:
    """Metrics for texts on single lines, as `sparseq score` and recipes ask for them.

    Args:
        names: Some of `METRICS`; a name that is repeated counts once.
        tokenize: sacrebleu's tokenizer for BLEU.
        lowercase: Ignore case in BLEU, chrF and exact match; ROUGE always does.
        rouge_stemmer: Strip English suffixes for ROUGE.
        rouge_tokenize: ROUGE's words: "ascii", or those of one of sacrebleu's tokenizers.

    Raises:
        ValueError: A name or a tokenizer is unknown, or options exclude each other.
        ModuleNotFoundError: ROUGE is asked for, and rouge-score is not installed.
    """
    for name in names:
        check_metric(name)
    make: dict[str, Callable[[], CorpusMetric]] = {
        "bleu": lambda: Bleu(tokenize=tokenize, lowercase=lowercase),
        "chrf": lambda: Chrf(lowercase=lowercase),
        "exact_match": lambda: ExactMatch(lowercase=lowercase),
        # A line holds no line breaks, so rougeLsum would only repeat rougeL.
        "rouge": lambda: Rouge(kinds=ROUGE_KINDS[:3], stemmer=rouge_stemmer, tokenize=rouge_tokenize),
    }
    return [make[name]() for name in dict.fromkeys(names)]


def check_metric(name: str) -> None:
    """Check that there is a metric of this name.

    Raises:
        ValueError: There is none; the message names the nearest and lists all.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), METRICS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no metric {name!r}. {hint}The metrics are {', '.join(METRICS)}.")


def _check_tokenizer(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"`tokenize` must be one of {', '.join(sorted(known))}, but is {name!r}.")


def _with_tokenizer(name: str, **options: Any) -> BLEU:
    try:
        return BLEU(tokenize=name, **options)
    except (ImportError, OSError, RuntimeError) as error:
        # Some need another package, some a model that sacrebleu downloads.
        raise ValueError(
            f"sacrebleu's tokenizer {name!r} cannot be used here: {' '.join(str(error).split())}"
        ) from error


def _signature(num_references: int, bootstrap: int, seed: int | None, options: dict[str, str]) -> str:
    arguments = {"num_refs": num_references, "n_bootstrap": bootstrap or None, "seed": seed if bootstrap else None}
    return str(_Signature(arguments, options))
