"""The tokens that experts take, against counters."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparseq.inspection import tokens as tokens_module
from sparseq.inspection.tokens import TokenTotals, readable_token, top_tokens

LAYERS, EXPERTS, TOP_K, VOCAB = 2, 4, 2, 12

Batch = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]


def random_batch(seed: int, rows: int = 5, length: int = 7) -> Batch:
    """Ids, choices that lean on the token, padding by the index E, and a mask that hides further tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    is_padding = torch.rand(rows * length, generator=generator) < 0.2
    indices = []
    for layer in range(LAYERS):
        noise = torch.rand(rows * length, EXPERTS, generator=generator)
        noise[torch.arange(rows * length), (ids.flatten() + layer) % 3] += 0.5
        indices.append(noise.topk(TOP_K, dim=-1).indices.masked_fill(is_padding[:, None], EXPERTS))
    return ids, indices, torch.rand(rows, length, generator=generator) < 0.8


def by_hand(batches: list[Batch]) -> tuple[list[Counter[tuple[int, int]]], Counter[int]]:
    """How often each layer's experts took each token, and how often each token occurred."""
    taken: list[Counter[tuple[int, int]]] = [Counter() for _ in range(LAYERS)]
    occurrences: Counter[int] = Counter()
    for ids, indices, is_real in batches:
        for place, (token, counts) in enumerate(zip(ids.flatten().tolist(), is_real.flatten().tolist(), strict=True)):
            if not counts or EXPERTS in indices[0][place].tolist():
                continue
            occurrences[token] += 1
            for layer in range(LAYERS):
                for expert in indices[layer][place].tolist():
                    taken[layer][token, expert] += 1
    return taken, occurrences


def totals_of(batches: list[Batch]) -> TokenTotals:
    totals = TokenTotals(LAYERS, EXPERTS)
    for batch in batches:
        totals.add(*batch)
    return totals


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    """A token for each id: "t0" to "t11"."""
    vocabulary = {f"t{token}": token for token in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")))


@pytest.mark.parametrize("buffer", [1, 60, 1 << 20])
def test_totals_equal_counters(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_BUFFER", buffer)
    batches = [random_batch(seed) for seed in range(6)]
    totals = totals_of(batches)
    taken, occurrences = by_hand(batches)
    for layer in range(LAYERS):
        ids, counts = totals.layer(layer)
        assert ids.tolist() == sorted(occurrences)
        found = {
            (token, expert): count
            for token, row in zip(ids.tolist(), counts.tolist(), strict=True)
            for expert, count in enumerate(row)
            if count
        }
        assert found == dict(taken[layer])


def test_merged_totals_are_those_of_all_batches() -> None:
    batches = [random_batch(seed) for seed in range(4)]
    merged, whole = TokenTotals(LAYERS, EXPERTS), totals_of(batches)
    for part in (batches[:1], batches[1:]):
        merged.merge(totals_of(part))
    for layer in range(LAYERS):
        for found, expected in zip(merged.layer(layer), whole.layer(layer), strict=True):
            assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("min_occurrences", [1, 12, 1000])
def test_top_tokens_equal_a_slow_ranking(min_occurrences: int, words: PreTrainedTokenizerBase) -> None:
    batches = [random_batch(seed) for seed in range(4)]
    taken, occurrences = by_hand(batches)
    assert min(occurrences.values()) < 12 < max(occurrences.values())
    totals = totals_of(batches)
    for layer in range(LAYERS):
        choices = TOP_K * sum(occurrences.values())
        load = [sum(taken[layer][token, expert] for token in occurrences) / choices for expert in range(EXPERTS)]
        found = top_tokens(totals, layer, words, top_k=TOP_K, limit=3, min_occurrences=min_occurrences)
        assert len(found) == EXPERTS
        for expert, tokens in enumerate(found):
            counts = {token: taken[layer][token, expert] for token in occurrences if taken[layer][token, expert]}
            # p(expert | token) as a share of choices, of which each occurrence has K.
            gain = {
                token: count * math.log(count / (TOP_K * occurrences[token]) / load[expert])
                for token, count in counts.items()
            }
            most = sorted(counts, key=lambda token: (-counts[token], token))[:3]
            assert [token.id for token in tokens.by_count] == most
            frequent = [token for token in gain if occurrences[token] >= min_occurrences and gain[token] > 0]
            telling = sorted(frequent, key=lambda token: (-gain[token], token))[:3]
            assert [token.id for token in tokens.by_information] == telling
            for token in (*tokens.by_count, *tokens.by_information):
                assert token.token == f"t{token.id}"
                assert (token.count, token.occurrences) == (counts[token.id], occurrences[token.id])
                assert token.information == pytest.approx(gain[token.id])
                assert token.share == counts[token.id] / occurrences[token.id]


def test_information_sums_to_the_mutual_information(words: PreTrainedTokenizerBase) -> None:
    batches = [random_batch(seed) for seed in range(4)]
    ids, counts = totals_of(batches).layer(0)
    experts = top_tokens(totals_of(batches), 0, words, top_k=TOP_K, limit=VOCAB, min_occurrences=1)
    joint = torch.tensor(counts) / counts.sum()
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    expected = float(torch.special.xlogy(joint, joint / independent).sum())
    found = sum(token.information for expert in experts for token in expert.by_count) / counts.sum()
    assert len(ids) == VOCAB
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_expert_without_tokens(words: PreTrainedTokenizerBase) -> None:
    totals = TokenTotals(1, 3)
    totals.add(torch.tensor([[1, 2]]), [torch.tensor([[0], [2]])], torch.ones(1, 2, dtype=torch.bool))
    first, second, third = top_tokens(totals, 0, words, top_k=1, min_occurrences=1)
    assert (second.by_count, second.by_information) == ((), ())
    assert [token.id for token in first.by_count] == [1]
    assert [token.id for token in third.by_information] == [2]
    assert third.by_information[0].information == pytest.approx(math.log(2))


def byte_level(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_tokens_can_be_read(tokenizer: PreTrainedTokenizerBase) -> None:
    names = {readable_token(tokenizer, token_id) for token_id in range(len(tokenizer))}
    assert {"</s>", "<2de>", "<0x0A>", "▁", "."} <= names
    assert any(name.startswith("▁") and len(name) > 2 for name in names), "a word with the blank before it"
    assert all(name.isprintable() and " " not in name for name in names)
    assert readable_token(tokenizer, len(tokenizer) + 5) == f"#{len(tokenizer) + 5}"


@pytest.mark.parametrize(
    ("token", "shown"),
    [("Ġdog", "▁dog"), ("MÃ¤n", "Män"), ("Ã", r"\xc3"), ("Ċ", r"\n"), ("âĢ®", r"\u202e"), ("</s>", "</s>")],
)
def test_byte_level_tokens_can_be_read(token: str, shown: str) -> None:
    byte_tokenizer: Any = byte_level({"a": 0, token: 1} if token != "</s>" else {"a": 0})
    assert readable_token(byte_tokenizer, 1) == shown
