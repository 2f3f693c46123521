"""Batch-wise translation equals translating one sentence after the other."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from sparseq import SparseqConfig
from sparseq.training.evaluation import translate_batchwise
from sparseq.training.tokenizer import train_tokenizer

SOURCES = ["a b c d e f g", "b", "", "c a b", "f e d c b a g a b c", "  ", "g g g", "a"]


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer(SOURCES * 3, vocab_size=280, language_tags=["de"], show_progress=False)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
@pytest.mark.filterwarnings("ignore:The texts hold only enough")
def test_batches_change_neither_order_nor_text(tokenizer, beams: int, batch_tokens: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    config = SparseqConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    model = AutoModelForSeq2SeqLM.from_config(config).train()
    options = {"num_beams": beams, "max_new_tokens": 12}
    translations = translate_batchwise(
        model, tokenizer, SOURCES, prefix="<2de> ", batch_tokens=batch_tokens, **options
    )
    assert model.training
    model.eval()
    for source, translation in zip(SOURCES, translations, strict=True):
        if not source.strip():
            assert translation == ""
            continue
        output = model.generate(**tokenizer([f"<2de> {source}"], return_tensors="pt"), **options)
        assert translation == tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    assert any(translations)


def test_a_budget_below_one_is_refused(tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="`batch_tokens` must be at least 1, but is 0"):
        translate_batchwise(None, tokenizer, ["a"], batch_tokens=0)  # type: ignore[arg-type]
