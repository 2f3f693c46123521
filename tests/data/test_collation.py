"""Tokenised pairs: tags, limits and padding."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from sparseq.data import collation
from sparseq.data.cleaning import Defect, Policy
from sparseq.data.collation import PairCollator, TokenizedPairs, tokenize_pairs
from sparseq.data.parallel import ParallelReport, ParallelText
from sparseq.data.store import Store
from sparseq.training.tokenizer import train_tokenizer

SENTENCES = ["a b c", "a", "a b c d e f g h"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    with pytest.warns(UserWarning, match="vocabulary"):
        return train_tokenizer(SENTENCES, vocab_size=400, language_tags=["de"], show_progress=False)


def _text(targets: list[str]) -> ParallelText:
    return ParallelText(SENTENCES, targets, ParallelReport("train", pairs=3, kept=3))


def test_sources_carry_the_tag_and_both_sides_end(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, report = tokenize_pairs(tokenizer, _text(["c", "b", "a"]), max_length=50, source_prefix="<2de> ")
    tag = tokenizer.convert_tokens_to_ids("<2de>")
    assert [ids[0] for ids in pairs.source_ids] == [tag] * 3
    assert tag not in pairs.target_ids[0]
    assert {ids[-1] for ids in [*pairs.source_ids, *pairs.target_ids]} == {tokenizer.eos_token_id}
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in pairs.source_ids] == SENTENCES
    assert pairs.source_lengths.tolist() == [len(ids) for ids in pairs.source_ids]
    assert (report.defects, report.kept) == ({}, 3)


def test_long_pairs_are_dropped_for_training_and_cut_for_evaluation(tokenizer: PreTrainedTokenizerFast) -> None:
    text = _text(["c", "a b c d e f g", "a"])
    dropped, report = tokenize_pairs(tokenizer, text, max_length=5)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in dropped.target_ids] == ["c"]
    assert report.defects == {"too_long": Defect(2, (2, 3), "skip")}
    assert (report.kept, report.pairs) == (1, 3)
    cut, report = tokenize_pairs(tokenizer, text, max_length=5, policy=Policy().for_evaluation())
    assert report.defects == {"too_long": Defect(2, (2, 3), "truncate")}
    assert (report.kept, len(cut)) == (3, 3)
    assert max(cut.source_lengths.max(), cut.target_lengths.max()) == 5
    assert {ids[-1] for ids in [*cut.source_ids, *cut.target_ids]} == {tokenizer.eos_token_id}
    with pytest.raises(ValueError, match=r"All 3 pairs of train .*more than 1 tokens.*data\.max_length"):
        tokenize_pairs(tokenizer, text, max_length=1)
    with pytest.raises(ValueError, match=r"refused.*2 pairs too long.*lines 2, 3.*data\.if_too_long=skip"):
        tokenize_pairs(tokenizer, text, max_length=5, policy=Policy(too_long="refuse"))


def test_each_side_may_have_its_own_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    # Sources of 4, 2 and 9 tokens, targets of 2, 8 and 4.
    text = _text(["c", "a b c d e f g", "a b c"])
    limits = {"max_length": 8, "max_target_length": 4}
    kept, report = tokenize_pairs(tokenizer, text, **limits)
    assert report.defects["too_long"] == Defect(2, (2, 3), "skip")
    assert [len(kept.source_ids[0]), len(kept.target_ids[0])] == [4, 2]
    whole, _ = tokenize_pairs(tokenizer, text, max_length=50)
    cut, _ = tokenize_pairs(tokenizer, text, **limits, policy=Policy(too_long="truncate"))
    end = [tokenizer.eos_token_id]
    assert cut.source_ids == [*whole.source_ids[:2], whole.source_ids[2][:7] + end]
    assert cut.target_ids == [whole.target_ids[0], whole.target_ids[1][:3] + end, whole.target_ids[2]]
    message = r"more than 8 tokens in the source or more than 1 in the target \(the shortest pair has 4 and 2\)"
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(tokenizer, text, max_length=8, max_target_length=1)


def test_unbalanced_pairs_are_judged_by_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    # Ends of sentences count: 4 : 2, 2 : 4, 9 : 9 tokens.
    text = _text(["a", "a b c", "a b c d e f g h"])
    for ratio, unbalanced in ((2.0, None), (1.9, Defect(2, (1, 2), "skip"))):
        policy = Policy(unbalanced="skip", max_length_ratio=ratio)
        pairs, report = tokenize_pairs(tokenizer, text, max_length=50, policy=policy)
        assert report.defects.get("unbalanced") == unbalanced
        assert len(pairs) == report.kept == 3 - (unbalanced.count if unbalanced else 0)


def test_several_batches_give_what_one_by_one_gives(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [" ".join("abcdefgh"[: 1 + row % 8]) for row in range(50)]
    text = ParallelText(sources, sources[::-1], ParallelReport("train", pairs=50, kept=50), key="some text")
    monkeypatch.setattr(collation, "_BATCH_PAIRS", 7)
    pairs, _ = tokenize_pairs(tokenizer, text, max_length=50, source_prefix="<2de> ", store=Store(tmp_path))
    expected = [
        {"input_ids": tokenizer("<2de> " + a)["input_ids"], "labels": tokenizer(text_target=b)["input_ids"]}
        for a, b in zip(sources, sources[::-1], strict=True)
    ]
    order = torch.randperm(50).tolist()
    assert pairs.__getitems__(order) == [expected[row] for row in order]
    assert [pairs[row] for row in range(50)] == expected
    assert pairs.target_lengths.tolist() == [len(row["labels"]) for row in expected]


def test_tokens_are_made_once_and_never_for_something_else(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = replace(_text(["c", "b", "a"]), key="this text")
    made: list[int] = []
    real = collation._tokenize

    def counted(*args: Any) -> Any:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(collation, "_tokenize", counted)

    def ids(text: ParallelText = text, by: PreTrainedTokenizerFast = tokenizer, **options: Any) -> list[list[int]]:
        return tokenize_pairs(by, text, **{"max_length": 50, "store": Store(tmp_path), **options})[0].source_ids

    first = ids()
    assert ids() == first
    assert len(made) == 1
    other = copy.deepcopy(tokenizer)
    other.add_language_tags(["fr"])
    changed = [
        ids(source_prefix="<2de> "),
        ids(max_length=4),
        ids(max_target_length=4),
        ids(policy=Policy(max_length_ratio=2.0)),
        ids(replace(text, key="other text")),
        ids(by=other),
    ]
    assert len(made) == 1 + len(changed)
    assert changed[0] != first
    ids()
    assert len(made) == 1 + len(changed)


def test_padding_equals_that_of_the_library(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = TokenizedPairs([[5, 6, 7, 2], [5, 2]], [[8, 2], [8, 9, 9, 9, 2]])
    features = [pairs[0], pairs[1]]
    ours = PairCollator(pad_token_id=0)(features)
    theirs = DataCollatorForSeq2Seq(tokenizer)([dict(feature) for feature in features])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_sides_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        TokenizedPairs([[2], [2]], [[2]])
