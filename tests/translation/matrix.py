"""Settings under which a search over an engine must give what `generate()` gives: chosen cases, and drawn ones."""

import random
from typing import Any

from tests.translation.decoding import ENDS, VOCAB

BEAMS = {"num_beams": 4, "num_return_sequences": 4}

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": BEAMS,
    "one of the beams": {"num_beams": 3},
    "ten beams": {"num_beams": 10, "num_return_sequences": 10},
    "stops when full": {**BEAMS, "early_stopping": True},
    "never stops early": {**BEAMS, "early_stopping": "never"},
    "long is good": {**BEAMS, "length_penalty": 2.0},
    "long is good, to the end": {**BEAMS, "length_penalty": 2.0, "early_stopping": "never"},
    "length does not count": {**BEAMS, "length_penalty": 0.0, "early_stopping": "never"},
    "short is good": {**BEAMS, "length_penalty": -0.5},
    "short is good, a whole number": {**BEAMS, "length_penalty": -1},
    "short is good, greedy": {"length_penalty": -1},
    "several ends": {**BEAMS, "eos_token_id": list(ENDS)},
    "several ends, greedy": {"eos_token_id": list(ENDS)},
    "no end": {**BEAMS, "eos_token_id": None},
    "all length": {**BEAMS, "max_length": 7},
    "all length, greedy": {"max_length": 7},
    "one token": {**BEAMS, "max_new_tokens": 1},
    "one token, greedy": {"max_new_tokens": 1},
    "forced first": {**BEAMS, "forced_bos_token_id": 9},
    "forced first, greedy": {"forced_bos_token_id": 9},
    "forced last": {**BEAMS, "forced_eos_token_id": 2, "max_new_tokens": 5},
    "forced last, greedy": {"forced_eos_token_id": 2, "max_new_tokens": 5},
    "forced last is no end": {**BEAMS, "forced_eos_token_id": 13, "max_new_tokens": 5},
    "forced last, of two that are not both allowed": {
        **BEAMS,
        "forced_eos_token_id": [2, 13],
        "suppress_tokens": [13],
        "max_new_tokens": 5,
    },
    "forced first and last": {"num_beams": 4, "forced_bos_token_id": 9, "forced_eos_token_id": 2, "max_length": 3},
    "minimum": {**BEAMS, "min_length": 6},
    "minimum, greedy": {"min_length": 6},
    "new minimum": {**BEAMS, "min_new_tokens": 4, "eos_token_id": list(ENDS)},
    "new minimum, greedy": {"min_new_tokens": 4, "eos_token_id": list(ENDS)},
    "suppressed": {**BEAMS, "suppress_tokens": [0, 9, 14, 29, 37]},
    "suppressed, greedy": {"suppress_tokens": [0, 9, 14, 29, 37]},
    "suppressed at first": {**BEAMS, "begin_suppress_tokens": [0, 2, 7, 10]},
    "suppressed at first, greedy": {"begin_suppress_tokens": [0, 2, 7, 10]},
    "suppressed behind the forced first": {**BEAMS, "begin_suppress_tokens": [2, 0], "forced_bos_token_id": 9},
    "a bad word": {**BEAMS, "bad_words_ids": [[0], [29], [2]]},
    "a bad word, greedy": {"bad_words_ids": [[0], [29], [2]]},
    "long bad words": {**BEAMS, "bad_words_ids": [[0], [7, 29], [22, 29, 16]]},
    "long bad words, greedy": {"bad_words_ids": [[0, 0], [0, 28, 0]]},
    "no n-gram twice": {**BEAMS, "no_repeat_ngram_size": 2},
    "no token twice, greedy": {"no_repeat_ngram_size": 1},
    "no n-gram of the source": {**BEAMS, "encoder_no_repeat_ngram_size": 1},
    "no n-gram of the source, greedy": {"encoder_no_repeat_ngram_size": 1},
    "repetition": {**BEAMS, "repetition_penalty": 1.4},
    "repetition, greedy": {"repetition_penalty": 1.4},
    "normalised again": {**BEAMS, "renormalize_logits": True, "min_length": 5, "suppress_tokens": [0, 29]},
    "without what is not finite": {**BEAMS, "remove_invalid_values": True, "forced_bos_token_id": 9},
    "biased": {**BEAMS, "sequence_bias": [[[0], -1.0], [[7, 29], 2.0]]},
    "decaying": {**BEAMS, "exponential_decay_length_penalty": (3, 1.1), "length_penalty": 2.0},
    "other starts": {**BEAMS, "decoder_start_token_id": [1, 4, 9, 1, 20]},
    "as Marian": {**BEAMS, "bad_words_ids": [[0]], "forced_eos_token_id": 2, "decoder_start_token_id": 0},
    "as BART for summaries": {
        "num_beams": 4,
        "forced_bos_token_id": 1,
        "forced_eos_token_id": 2,
        "min_length": 6,
        "no_repeat_ngram_size": 3,
        "length_penalty": 2.0,
        "early_stopping": True,
    },
}

DRAWN = 72


def drawn(seed: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Settings and prefixes of five sentences: of no tokens, of one length, or of several."""
    draw = random.Random(seed)
    beams = draw.choice([1, 2, 3, 5])
    settings: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": draw.randint(1, beams),
        **draw.choice([{"max_new_tokens": draw.randint(1, 14)}, {"max_length": draw.randint(5, 14)}]),
        "eos_token_id": draw.choice([2, [2], [2, 7], list(ENDS), None]),
    }
    if beams > 1:
        settings["early_stopping"] = draw.choice([True, False, "never"])
        settings["length_penalty"] = draw.choice([-1.0, 0.0, 0.6, 1.0, 1.7])
    few = [draw.randrange(VOCAB) for _ in range(4)]
    optional = {
        "min_length": draw.randint(1, 8),
        "min_new_tokens": draw.randint(1, 6),
        "forced_bos_token_id": 9,
        "forced_eos_token_id": draw.choice([2, 13]),
        "suppress_tokens": [token for token in few if token not in (2, 9, 13)] or [5],
        "begin_suppress_tokens": [2, 0],
        "bad_words_ids": draw.choice([[[few[0]], [few[1]]], [[few[0]], [few[1], few[2]]]]),
        "no_repeat_ngram_size": draw.randint(1, 3),
        "encoder_no_repeat_ngram_size": draw.randint(1, 3),
        "repetition_penalty": draw.choice([0.8, 1.3]),
        "renormalize_logits": True,
        "remove_invalid_values": True,
    }
    # Half of the draws have no setting that looks back: those go by other code.
    names = list(optional)[: 7 if seed % 2 else None]
    settings |= {name: optional[name] for name in draw.sample(names, draw.randint(0, 3))}
    lengths = draw.choice([[0] * 5, [2] * 5, [3, 0, 1, 0, 3]])
    return settings, [[draw.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
