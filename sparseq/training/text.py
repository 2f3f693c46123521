"""The text of a training run: found, read, tokenised, translated and scored, for one language pair or several."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseq.data.cleaning import describe_defects
from sparseq.data.collation import TokenizedPairs, tokenize_pairs
from sparseq.data.mixing import MixedPairs
from sparseq.data.parallel import ParallelReport, ParallelText, join, join_reports, read_pairs
from sparseq.data.store import Store
from sparseq.metrics.corpus import CorpusMetric
from sparseq.metrics.scoring import score_predictions
from sparseq.tokenization_sparseq import source_prefix
from sparseq.training.evaluation import translate_batchwise
from sparseq.training.recipes import Recipe
from sparseq.training.sections import DataRecipe

GENERATED_DATA = "data"


def locate_data(recipe: Recipe, output_dir: Path) -> DataRecipe:
    """The data section with its folder; writes the generated corpus into `output_dir` where the recipe asks for it.

    Raises:
        ValueError: The recipe names neither a folder nor a generated corpus, or no languages.
    """
    data = recipe.data
    if data.folder is None and data.generated_pairs:
        from sparseq.data.grammar import generate_corpus, write_corpus

        folder = output_dir / GENERATED_DATA
        # The complete corpus appears at once: a run killed while writing must not leave half of it behind.
        if not folder.is_dir():
            partial = output_dir / f"{GENERATED_DATA}.partial"
            write_corpus(generate_corpus(train_size=data.generated_pairs, seed=recipe.seed), partial)
            partial.rename(folder)
        return replace(data, folder=str(folder))
    if data.test_files is not None and data.test is None:
        data = replace(data, test="test")
    places = data.places()
    by_name = [place for place in places if place.dataset is None and not place.files]
    missing = ["data.folder"] if any(place.folder is None for place in by_name) else []
    missing += [f"data.{side}" for side in ("source", "target") if any(getattr(p, side) is None for p in by_name)]
    if missing:
        raise ValueError(
            f"recipe {recipe.name} needs {', '.join(missing)}: add, for instance, data.folder=DIR data.source=en "
            "data.target=de for files DIR/train.en, DIR/train.de, DIR/val.en, DIR/val.de; or data.dataset=..., a "
            "dataset, or data.train_files=... and data.validation_files=..., tables. docs/data.md has all ways."
        )
    return data


def read_splits(data: DataRecipe, store: Store | None = None, *, progress: bool = False) -> dict[str, ParallelText]:
    """The training, validation and test text of a located data section, by the name of the split.

    Args:
        data: What `locate_data` returns.
        store: Keeps the text on disk. None: in memory.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A dataset, split or column is missing, or the text is defective.
    """
    splits = dict.fromkeys([data.train, data.validation, *([data.test] if data.test else [])])
    places = data.places()
    texts = {}
    # Everything is found before anything is read, which may take long.
    policies = {split: data.policy() if split == data.train else data.policy().for_evaluation() for split in splits}
    opened = {
        split: [place.open(split, refuse_bytes=policies[split].not_utf8 == "refuse") for place in places]
        for split in splits
    }
    # The small splits first: what is wrong with them is known at once.
    for split, sources in reversed(opened.items()):
        parts = [
            read_pairs(
                source,
                split,
                policies[split],
                language=place.target,
                language_pair=place.name if len(places) > 1 else None,
                max_pairs=data.max_pairs if split == data.train else 0,
                store=store,
                progress=progress,
            )
            for place, source in zip(places, sources, strict=True)
        ]
        texts[split] = join(split, parts)
    return {split: texts[split] for split in splits}


def sentences(text: ParallelText, limit: int) -> Iterator[str]:
    """The sources, then the targets, of each language pair; at most `limit` of them, evenly spaced."""
    step = max(1.0, 2 * len(text) / limit)
    for part in text.parts or (text,):
        for side in (part.sources, part.targets):
            due = 0.0
            for position, sentence in enumerate(side):
                if position >= due:
                    due += step
                    yield sentence


def languages(text: ParallelText) -> list[str]:
    """The target languages, each once."""
    return list(dict.fromkeys(part.language for part in text.parts or (text,) if part.language is not None))


def tokenize_splits(
    recipe: Recipe,
    data: DataRecipe,
    texts: dict[str, ParallelText],
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    *,
    progress: bool,
) -> tuple[dict[str, TokenizedPairs | MixedPairs], dict[str, ParallelReport]]:
    """Training and validation text as ids, and the reports of all splits."""
    pairs: dict[str, TokenizedPairs | MixedPairs] = {}
    reports = {name: text.report for name, text in texts.items()}
    for split in dict.fromkeys([data.train, data.validation]):
        is_training = split == data.train
        done = [
            tokenize_pairs(
                tokenizer,
                part,
                max_length=data.max_length,
                max_target_length=data.max_target_length,
                policy=data.policy() if is_training else data.policy().for_evaluation(),
                source_prefix=tag_prefix(tokenizer, part.language, alone=not texts[split].parts),
                store=store,
                progress=progress,
            )
            for part in texts[split].parts or (texts[split],)
        ]
        reports[split] = join_reports(split, [report for _, report in done])
        parts = [part for part, _ in done]
        temperature = float(data.temperature) if is_training else 1.0
        pairs[split] = parts[0] if len(parts) == 1 else MixedPairs(parts, temperature=temperature, seed=recipe.seed)
    return pairs, reports


def describe_tokens(reports: dict[str, ParallelReport]) -> Iterator[str]:
    """What tokenisation has found, which the reports of the text did not have yet."""
    for report in reports.values():
        for part in report.parts or (report,):
            found = {kind: part.defects[kind] for kind in ("too_long", "unbalanced") if kind in part.defects}
            for words in describe_defects(found, part.unit):
                yield f"{part.name}, in tokens: {words}"


def tag_prefix(tokenizer: PreTrainedTokenizerBase, language: str | None, *, alone: bool) -> str:
    """What the sources begin with whose targets are of `language`.

    Raises:
        ValueError: The run has several languages, and the tokenizer no tag for this one.
    """
    prefix = source_prefix(tokenizer, language) if language is not None else ""
    if not prefix and not alone:
        raise ValueError(
            f"The tokenizer has no tag <2{language}>, which tells the languages of this run apart. Add it "
            "with `SparseqTokenizer.add_language_tags`, or let the run train its own tokenizer."
        )
    return prefix


def translate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: ParallelText,
    recipe: Recipe,
    data: DataRecipe,
    *,
    progress: bool,
    **generation_options: Any,
) -> list[str]:
    """Translations of all language pairs, one pair after the other; options as for `translate_batchwise`."""
    translations: list[str] = []
    for part in text.parts or (text,):
        translations += translate_batchwise(
            model,
            tokenizer,
            list(part.sources),
            prefix=tag_prefix(tokenizer, part.language, alone=not text.parts),
            batch_tokens=recipe.decoding.batch_tokens,
            max_source_length=data.max_length,
            progress=progress,
            **generation_options,
        )
    return translations


def score_text(
    translations: Sequence[str], text: ParallelText, metrics: Sequence[CorpusMetric], *, bootstrap: int = 0
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Reports of all translations, and of each language pair where there are several, as `Scored.report` makes them.

    BLEU and the like over sentences of several languages mean nothing, so for several pairs the first are the means of
    the second.
    """
    by_pair = {
        name: score_predictions(translations[rows], list(part.targets), metrics, bootstrap=bootstrap)
        for name, part, rows in language_pairs(text)
    }
    if not by_pair:
        return score_predictions(translations, list(text.targets), metrics, bootstrap=bootstrap).report(), {}
    several = list(by_pair.values())
    scores: dict[str, Any] = {"sentences": len(translations)}
    for metric in metrics:
        for figure in metric.figures:
            scores[figure] = sum(one.scores[figure] for one in several) / len(several)
        signature = several[0].signatures[metric.name]
        scores[f"{metric.name}_signature"] = f"mean of {len(several)} language pairs, {signature}"
    return scores, {name: one.report() for name, one in by_pair.items()}


def language_pairs(text: ParallelText) -> Iterator[tuple[str, ParallelText, slice]]:
    """Name, text and rows of each language pair where there are several; nothing for a single one."""
    start = 0
    for part in text.parts:
        assert part.report.language_pair is not None
        yield part.report.language_pair, part, slice(start, start + len(part))
        start += len(part)


def write_translations(folder: Path, split: str, text: ParallelText, translations: Sequence[str]) -> None:
    """Write `{split}.{target}.translated`, or for several pairs `{split}.{source}-{target}.translated`, a sentence a
    line."""
    whole = (text.language or "target", text, slice(0, len(text)))
    for name, _, rows in list(language_pairs(text)) or [whole]:
        lines = "".join(line.replace("\n", " ") + "\n" for line in translations[rows])
        (folder / f"{split}.{name}.translated").write_text(lines, encoding="utf-8")
