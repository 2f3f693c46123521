"""Searches over an engine against `model.generate()`, with an engine that has no cleverness of its own."""

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from sparseq import SparseqForConditionalGeneration
from sparseq.translation import decoding_plan, runtime_backend, search
from sparseq.translation.backend import Hypothesis
from tests.translation.decoding import (
    ENDS,
    LENGTHS,
    VOCAB,
    assert_same,
    decode,
    ending_model,
    generate,
    settings_of,
    sources,
)
from tests.translation.matrix import BEAMS, CASES, DRAWN, drawn
from tests.translation.torch_engine import TorchEngine

MODEL = ending_model()
IDS, MASK = sources()


def run(settings: GenerationConfig, **options: Any) -> list[list[Hypothesis]]:
    return decode(TorchEngine(MODEL), settings, IDS, MASK, **options)


def test_the_sentences_of_these_tests_end_at_different_steps() -> None:
    found = run(settings_of(MODEL, **BEAMS))
    lengths = {len(one.token_ids) for hypotheses in found for one in hypotheses}
    assert lengths >= {0, 2, 3, 4, 5, 7}
    assert len({token for hypotheses in found for one in hypotheses for token in one.token_ids}) > 12
    assert {len(found[0].token_ids) for found in run(settings_of(MODEL))} == {0, 2, 3, 7, 12}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_scores_are_those_of_generate(case: str) -> None:
    settings = settings_of(MODEL, **CASES[case])
    assert_same(run(settings), generate(MODEL, settings, IDS, MASK))


@pytest.mark.parametrize("seed", range(DRAWN))
def test_tokens_and_scores_are_those_of_generate_under_drawn_settings(seed: int) -> None:
    changes, prefixes = drawn(seed)
    settings = settings_of(MODEL, **changes)
    # A minimum above the maximum, of which generate() warns, is drawn as well.
    warnings.simplefilter("ignore", UserWarning)
    # generate() takes prefixes of one length: each sentence has its own call.
    expected = [
        generate(MODEL, settings, IDS[row : row + 1], MASK[row : row + 1], prefix)[0]
        for row, prefix in enumerate(prefixes)
    ]
    assert_same(run(settings, prefixes=prefixes), expected)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4}, {"position_embedding_type": "rotary"}])
@pytest.mark.parametrize("beams", [1, 3])
def test_other_models_are_decoded_alike(changes: dict[str, Any], beams: int) -> None:
    model = ending_model(5, **changes)
    settings = settings_of(model, num_beams=beams)
    assert_same(decode(TorchEngine(model), settings, IDS, MASK), generate(model, settings, IDS, MASK))


@pytest.mark.parametrize("bias", [30.0, -30.0])
@pytest.mark.parametrize("changes", [{}, BEAMS])
def test_all_end_at_the_first_step_or_never(bias: float, changes: dict[str, Any]) -> None:
    model = ending_model(bias=bias)
    settings = settings_of(model, **changes)
    found = decode(TorchEngine(model), settings, IDS, MASK)
    assert_same(found, generate(model, settings, IDS, MASK))
    assert {len(hypotheses[0].token_ids) for hypotheses in found} == ({0} if bias > 0 else {12})


def test_enough_hypotheses_go_on_where_several_ends_are_likelier_than_all_else() -> None:
    model = ending_model()
    model.final_logits_bias[0, list(ENDS)] = 5.0
    settings = settings_of(model, **BEAMS, eos_token_id=list(ENDS), length_penalty=2.0, early_stopping="never")
    found = decode(TorchEngine(model), settings, IDS, MASK)
    assert_same(found, generate(model, settings, IDS, MASK))
    assert max(len(one.token_ids) for hypotheses in found for one in hypotheses) > 2


@pytest.mark.parametrize("beams", [1, 3])
def test_learned_positions_are_used_up_to_the_last(beams: int) -> None:
    model = ending_model(bias=-30.0, position_embedding_type="learned", max_position_embeddings=9)
    settings = settings_of(model, num_beams=beams, max_new_tokens=9)
    found = decode(TorchEngine(model), settings, IDS, MASK)
    assert_same(found, generate(model, settings, IDS, MASK))
    assert len(found[0][0].token_ids) == 9
    # The default maximum of generate(), 20 tokens more, ends at the last position.
    settings.max_new_tokens = None
    assert len(decode(TorchEngine(model), settings, IDS, MASK)[0][0].token_ids) == 8


@pytest.mark.parametrize("changes", [{}, {"max_length": None, "max_new_tokens": None}])
def test_without_a_maximum_twenty_tokens_are_generated(changes: dict[str, Any]) -> None:
    model = ending_model(bias=-30.0)
    settings = settings_of(model)
    settings.max_new_tokens = None
    found = decode(TorchEngine(model), settings, IDS, MASK, [[5, 6], [], [], [], []])
    assert [len(hypotheses[0].token_ids) for hypotheses in found] == [22, 20, 20, 20, 20]


def test_token_log_probs_add_up_to_the_score() -> None:
    for changes in (BEAMS, {}):
        settings = settings_of(MODEL, length_penalty=0.7, **changes)
        for hypotheses in run(settings, prefixes=[[5, 6], [], [3], [], []]):
            for one in hypotheses:
                total = sum(one.token_log_probs) / len(one.token_log_probs) ** 0.7
                np.testing.assert_allclose(one.score, total, rtol=1e-5)


@pytest.mark.parametrize("case", ["beams", "greedy", "repetition", "minimum, greedy", "no n-gram of the source"])
def test_who_leaves_the_batch_and_when_changes_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(MODEL, **CASES[case])
    prefixes = [[5, 6], [], [3], [], []]
    found, row_counts = [], []
    # Each one at once; as it is; nobody.
    for share in (0, search._LEAVING_SHARE, 2):
        monkeypatch.setattr(search, "_LEAVING_SHARE", share)
        engine = TorchEngine(MODEL)
        found.append(decode(engine, settings, IDS, MASK, prefixes))
        row_counts.append(engine.row_counts)
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])
    rows = max(settings.num_beams or 1, 1)
    assert set(row_counts[2]) == {len(IDS) * rows}
    assert row_counts[0][-1] < row_counts[2][-1], "somebody must have left"


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, 1),
        ({"forced_bos_token_id": 9, "forced_eos_token_id": 2}, 1),
        ({"num_beams": 4}, 8),
        ({"num_beams": 4, "eos_token_id": [2, 7, 11]}, 16),
        ({"num_beams": 4, "forced_bos_token_id": 9, "forced_eos_token_id": 2}, 8),
        ({"num_beams": 4, "min_length": 3}, 9),
        ({"num_beams": 4, "bad_words_ids": [[0]], "suppress_tokens": [5, 6]}, 11),
        ({"num_beams": 25}, VOCAB),
        ({"do_sample": True, "top_k": 7}, 7),
        ({"num_beams": 4, "repetition_penalty": 1.2}, 0),
        ({"min_length": 3}, 0),
    ],
)
def test_the_engine_is_asked_for_no_more_than_a_search_needs(changes: dict[str, Any], asked: int) -> None:
    engine = TorchEngine(MODEL)
    decode(engine, settings_of(MODEL, **changes), IDS, MASK)
    assert set(engine.asked) == {asked}


@pytest.mark.parametrize("changes", [{}, BEAMS])
@pytest.mark.parametrize("prefixes", [None, [[5, 6], [], [3], [], []]])
def test_attention_is_that_of_the_steps_that_chose_the_tokens(
    changes: dict[str, Any], prefixes: list[list[int]] | None
) -> None:
    model = ending_model(decoder_layers=3)
    model.set_attn_implementation("eager")
    for row, hypotheses in enumerate(
        decode(TorchEngine(model), settings_of(model, **changes), IDS, MASK, prefixes, attention=True)
    ):
        for one in hypotheses:
            inputs = torch.tensor([[1, *one.token_ids]])
            ids = IDS[row : row + 1, : LENGTHS[row]]
            with torch.no_grad():
                output = model(ids, decoder_input_ids=inputs, output_attentions=True)
            expected = output.cross_attentions[1][0].mean(dim=0)[:-1]
            assert one.attention is not None
            assert one.attention.shape == (len(one.token_ids), LENGTHS[row])
            np.testing.assert_allclose(one.attention, expected, atol=1e-5)


def test_tokens_are_told_when_they_are_chosen() -> None:
    prefixes = [[5, 6], [], [3], [], []]
    told: list[list[int]] = [[] for _ in IDS]
    settings = settings_of(MODEL)
    found = run(settings, prefixes=prefixes, on_token=lambda row, token: told[row].append(token))
    assert [hypotheses[0].token_ids[len(prefix) :] for hypotheses, prefix in zip(found, prefixes, strict=True)] == told
    steps: list[int] = []
    engine = TorchEngine(MODEL)
    decode(engine, settings, IDS[3:4], MASK[3:4], on_token=lambda row, token: steps.append(len(engine.asked)))
    assert steps == list(range(1, 13)), "each token before the next step"


def test_nothing_of_a_batch_stays_when_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    class Watched(search.History):
        def __init__(self, *size: int) -> None:
            super().__init__(*size)
            alive.extend([weakref.ref(self), weakref.ref(self._tokens)])

        def append_attention(self, attention: np.ndarray) -> None:
            super().append_attention(attention)
            alive.append(weakref.ref(self._attention[-1]))

    class Engine(TorchEngine):
        def start(self, *arguments: Any, **options: Any) -> Any:
            state = super().start(*arguments, **options)
            alive.append(weakref.ref(state))
            return state

    monkeypatch.setattr(search, "History", Watched)
    model = ending_model()
    model.set_attn_implementation("eager")
    # Freed at once, not when the collector of cycles comes by.
    gc.disable()
    try:
        for changes in ({}, BEAMS, {"num_beams": 2, "repetition_penalty": 1.2}):
            kept = decode(Engine(model), settings_of(model, **changes), IDS, MASK, attention=True)
            assert len(alive) > 6
            assert all(reference() is None for reference in alive)
            assert kept[1][0].attention.base is None, "a view would keep the attention of the whole batch"
    finally:
        gc.enable()


def test_an_empty_batch_has_no_translations() -> None:
    assert decode(TorchEngine(MODEL), settings_of(MODEL), IDS[:0], MASK[:0]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_time": 1.0}, r"`max_time` = 1.0 is not supported.*runtime=\"torch\""),
        ({"stop_strings": ["."]}, "`stop_strings`"),
        ({"guidance_scale": 1.5}, "`guidance_scale` = 1.5"),
        ({"encoder_repetition_penalty": 1.5}, "`encoder_repetition_penalty`"),
        ({"num_beams": 4, "num_beam_groups": 2}, "`num_beam_groups` = 2"),
        ({"num_beams": 4, "do_sample": True}, r"`do_sample` with `num_beams` = 4.*runtime=\"torch\""),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` = 3"),
        ({"forced_bos_token_id": VOCAB}, f"`forced_bos_token_id` is {VOCAB}, but the vocabulary has {VOCAB}"),
        ({"decoder_start_token_id": VOCAB}, f"`decoder_start_token_id` is {VOCAB}, but the vocabulary has {VOCAB}"),
        ({"decoder_start_token_id": -1}, f"`decoder_start_token_id` is -1, but the vocabulary has {VOCAB}"),
        ({"decoder_start_token_id": [1, 2]}, "has 2 tokens, but the batch 5 sentences"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_before_decoding(changes: dict[str, Any], message: str) -> None:
    engine = TorchEngine(MODEL)
    with pytest.raises(ValueError, match=message):
        decode(engine, settings_of(MODEL, **changes), IDS, MASK)
    assert engine.asked == []


def test_more_hypotheses_than_beams_are_refused() -> None:
    # As an attribute: the constructor of the settings would refuse it, too.
    settings = settings_of(MODEL, num_beams=2)
    settings.num_return_sequences = 3
    with pytest.raises(ValueError, match="`num_return_sequences` is 3, but a search with `num_beams` = 2"):
        run(settings)


def test_neutral_values_and_fields_of_the_caller_are_no_reason_to_refuse() -> None:
    settings = settings_of(MODEL, guidance_scale=1.0, num_beam_groups=1, diversity_penalty=0.0, use_mtp=False)
    settings.seed = None
    settings.language = "de"
    assert_same(run(settings), run(settings_of(MODEL)))


def test_every_setting_of_generate_is_honoured_without_effect_or_refused() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields >= decoding_plan.HONOURED | decoding_plan.WITHOUT_EFFECT
    assert not decoding_plan.HONOURED & decoding_plan.WITHOUT_EFFECT
    for name in fields - decoding_plan.HONOURED - decoding_plan.WITHOUT_EFFECT:
        settings = settings_of(MODEL)
        setattr(settings, name, 2)
        with pytest.raises(ValueError, match=f"`{name}` = 2"):
            decoding_plan.check_settings(settings)


@pytest.mark.parametrize("changes", [BEAMS, {"do_sample": True, "num_return_sequences": 2}])
def test_only_one_hypothesis_is_streamed(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="streamed with `num_beams=1` and `num_return_sequences=1` only"):
        run(settings_of(MODEL, **changes), on_token=lambda row, token: None)


def learned(limit: int) -> SparseqForConditionalGeneration:
    return ending_model(position_embedding_type="learned", max_position_embeddings=limit)


def test_what_the_model_has_no_positions_for_is_refused() -> None:
    model = learned(9)
    settings = settings_of(model, max_new_tokens=8)
    prefixes: list[list[int]] = [[], [5, 6], [], [], []]
    with pytest.raises(ValueError, match=r"`max_new_tokens` is 8, but the model has 9.*prefix take 3.*7 or less"):
        decode(TorchEngine(model), settings, IDS, MASK, prefixes)
    with pytest.raises(ValueError, match=r"`max_length` is 11, but the model has 9.*9 or less"):
        decode(TorchEngine(model), settings_of(model, max_length=11), IDS, MASK)


def test_a_prefix_without_room_behind_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sentence 1 begins with 4 tokens.*stops at 4"):
        run(settings_of(MODEL, max_length=4), prefixes=[[], [5, 6, 7], [], [], []])


def test_the_backend_has_the_name_of_its_runtime() -> None:
    assert runtime_backend.RuntimeBackend(TorchEngine(MODEL), name="PyTorch").name == "PyTorch"
