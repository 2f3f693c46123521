"""Tokenised pairs: tags, limits and padding."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from sparseq.data.collation import PairCollator, TokenizedPairs, tokenize_pairs
from sparseq.data.parallel import ParallelReport, ParallelText
from sparseq.training.tokenizer import train_tokenizer

SENTENCES = ["a b c", "a", "a b c d e f g h"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    with pytest.warns(UserWarning, match="vocabulary"):
        return train_tokenizer(SENTENCES, vocab_size=400, language_tags=["de"], show_progress=False)


def _text(targets: list[str]) -> ParallelText:
    return ParallelText(SENTENCES, targets, ParallelReport("train", pairs=3, kept=3))


def test_sources_carry_the_tag_and_both_sides_end(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, report = tokenize_pairs(
        tokenizer, _text(["c", "b", "a"]), max_length=50, drop_long=True, source_prefix="<2de> "
    )
    tag = tokenizer.convert_tokens_to_ids("<2de>")
    assert [ids[0] for ids in pairs.source_ids] == [tag] * 3
    assert tag not in pairs.target_ids[0]
    assert {ids[-1] for ids in [*pairs.source_ids, *pairs.target_ids]} == {tokenizer.eos_token_id}
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in pairs.source_ids] == SENTENCES
    assert pairs.source_lengths == [len(ids) for ids in pairs.source_ids]
    assert (report.too_long, report.kept) == (0, 3)


def test_long_pairs_are_dropped_for_training_and_cut_for_evaluation(tokenizer: PreTrainedTokenizerFast) -> None:
    text = _text(["c", "a b c d e f g", "a"])
    dropped, report = tokenize_pairs(tokenizer, text, max_length=5, drop_long=True)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in dropped.target_ids] == ["c"]
    assert (report.too_long, report.kept, report.pairs) == (2, 1, 3)
    cut, report = tokenize_pairs(tokenizer, text, max_length=5, drop_long=False)
    assert (report.too_long, report.kept, len(cut)) == (2, 3, 3)
    assert max(cut.source_lengths + cut.target_lengths) == 5
    assert {ids[-1] for ids in [*cut.source_ids, *cut.target_ids]} == {tokenizer.eos_token_id}
    with pytest.raises(ValueError, match=r"All 3 pairs of train .*more than 1 tokens.*data\.max_length"):
        tokenize_pairs(tokenizer, text, max_length=1, drop_long=True)


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
