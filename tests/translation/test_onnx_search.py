"""Searches over ONNX Runtime against `model.generate()`: what is written once for all engines, on the one that users
meet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseq.graphs.files import export_graphs
from sparseq.translation.onnx_engine import OnnxEngine
from tests.translation.decoding import LENGTHS, assert_same, decode, ending_model, generate, settings_of, sources
from tests.translation.matrix import BEAMS, CASES, DRAWN, drawn
from tests.translation.torch_engine import TorchEngine

MODELS = {
    "dense": ending_model(),
    "sparse": ending_model(num_experts=4, num_experts_per_tok=2, decoder_layers=3, position_embedding_type="learned"),
}
IDS, MASK = sources()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxEngine]:
    folder = tmp_path_factory.mktemp("graphs")
    for name, model in MODELS.items():
        export_graphs(model, folder / name)
    return {name: OnnxEngine(Path(folder) / name, threads=1) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_scores_are_those_of_generate(case: str, name: str, engines: dict[str, OnnxEngine]) -> None:
    settings = settings_of(MODELS[name], **CASES[case])
    assert_same(decode(engines[name], settings, IDS, MASK), generate(MODELS[name], settings, IDS, MASK))


@pytest.mark.parametrize("seed", range(DRAWN // 2))
def test_drawn_settings_give_what_the_obvious_engine_gives(seed: int, engines: dict[str, OnnxEngine]) -> None:
    name = list(MODELS)[seed // 2 % 2]
    changes, prefixes = drawn(seed)
    settings = settings_of(MODELS[name], **changes)
    # Which test_search.py holds against generate().
    expected = decode(TorchEngine(MODELS[name]), settings, IDS, MASK, prefixes)
    assert_same(decode(engines[name], settings, IDS, MASK, prefixes), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [{}, BEAMS])
def test_attention_is_that_of_the_obvious_engine(
    changes: dict[str, Any], name: str, engines: dict[str, OnnxEngine]
) -> None:
    model = MODELS[name]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    settings, prefixes = settings_of(model, **changes), [[5, 6], [], [3], [], []]
    expected = decode(TorchEngine(model), settings, IDS, MASK, prefixes, attention=True)
    model.set_attn_implementation(implementation)
    found = decode(engines[name], settings, IDS, MASK, prefixes, attention=True)
    assert_same(found, expected)
    for length, hypotheses, others in zip(LENGTHS, found, expected, strict=True):
        for one, other in zip(hypotheses, others, strict=True):
            assert one.attention.shape == (len(one.token_ids), length)
            np.testing.assert_allclose(one.attention, other.attention, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_samples_of_a_seed_are_those_of_the_obvious_engine(name: str, engines: dict[str, OnnxEngine]) -> None:
    settings = settings_of(MODELS[name], do_sample=True, num_return_sequences=3, top_k=10, temperature=0.8)
    settings.seed = 4
    assert_same(decode(engines[name], settings, IDS, MASK), decode(TorchEngine(MODELS[name]), settings, IDS, MASK))
