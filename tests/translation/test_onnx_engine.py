"""The engine over ONNX Runtime against the PyTorch model, which computes each row's whole history anew."""

import gc
import platform
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseq import SparseqForConditionalGeneration
from sparseq.graphs.files import export_graphs
from sparseq.translation import onnx_engine
from sparseq.translation.onnx_engine import OnnxEngine
from tests.tiny import VOCAB, source_batch, tiny_model

DENSE = {"num_experts": 0, "position_embedding_type": "sinusoidal", "decoder_num_key_value_heads": 2}


class Rows:
    """What an engine's state stands for: of each row its source and the tokens so far."""

    def __init__(self, model: SparseqForConditionalGeneration, source: torch.Tensor, beams: int):
        self.model, self.source, self.beams = model, source, beams
        self.tokens = np.zeros((len(source) * beams, 0), dtype=np.int64)

    def step(self, tokens: np.ndarray, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Logits and attention of the last token."""
        history = self.tokens if rows is None else self.tokens[rows]
        self.tokens = np.concatenate([history, tokens[:, None]], axis=1)
        source = self.source.repeat_interleave(self.beams, dim=0)
        with torch.no_grad():
            output = self.model(source, decoder_input_ids=torch.from_numpy(self.tokens), output_attentions=True)
        return output.logits[:, -1].numpy(), output.cross_attentions[0][:, :, -1].mean(dim=1).numpy()

    def select(self, sources: np.ndarray) -> None:
        kept = (sources[:, None] * self.beams + np.arange(self.beams)).reshape(-1)
        self.source, self.tokens = self.source[sources], self.tokens[kept]


def drawn_rows(generator: np.random.Generator, sources: int, beams: int) -> np.ndarray:
    """For each row a row of its own source."""
    return (np.arange(sources)[:, None] * beams + generator.integers(beams, size=(sources, beams))).reshape(-1)


@pytest.fixture(scope="module")
def model() -> SparseqForConditionalGeneration:
    model = tiny_model(**DENSE)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def engine(model: SparseqForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    folder = tmp_path_factory.mktemp("graphs") / "float32"
    export_graphs(model, folder)
    return OnnxEngine(folder, threads=1)


@pytest.mark.parametrize("beams", [1, 3])
def test_steps_reorders_and_selections_agree_with_the_model(
    beams: int, engine: OnnxEngine, model: SparseqForConditionalGeneration
) -> None:
    generator = np.random.default_rng(beams)
    source = source_batch((9, 6, 8, 4))
    state = engine.start(source.numpy(), source.ne(0).long().numpy(), beams=beams)
    expected = Rows(model, source, beams)
    # The cache grows three times, the last time by half of what it has.
    for step in range(70):
        if step in (20, 41):
            kept = np.array([0, 2, 3]) if step == 20 else np.array([1, 2])
            engine.select(state, kept)
            expected.select(kept)
        sources = len(expected.source)
        tokens = generator.integers(3, VOCAB, sources * beams)
        rows = drawn_rows(generator, sources, beams) if step % 3 else None
        gives_attention = step % 4 == 1
        output = engine.step(state, tokens, rows=rows, attention=gives_attention)
        logits, attention = expected.step(tokens, rows)
        np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4)
        assert (output.attention is not None) == gives_attention
        if gives_attention:
            np.testing.assert_allclose(output.attention, attention[:, : output.attention.shape[1]], atol=1e-5)


def test_rows_of_a_source_are_decoded_once_until_they_differ(
    engine: OnnxEngine, model: SparseqForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    run = onnx_engine._Binding.run
    monkeypatch.setattr(
        onnx_engine._Binding,
        "run",
        lambda binding, *args: (decoded.append(len(binding.tokens)), run(binding, *args)),
    )
    generator = np.random.default_rng(5)
    source = source_batch((9, 6, 8, 4))
    state = engine.start(source.numpy(), source.ne(0).long().numpy(), beams=3)
    expected = Rows(model, source, 3)
    # Alike beyond the first capacity of the cache.
    for step in range(40):
        if step == 10:
            engine.select(state, np.array([1, 3]))
            expected.select(np.array([1, 3]))
        sources = len(expected.source)
        tokens = generator.integers(3, VOCAB, sources).repeat(3)
        if step >= 36:
            tokens[1] = tokens[0] % (VOCAB - 3) + 3
        rows = drawn_rows(generator, sources, 3) if step % 2 else None
        output = engine.step(state, tokens, rows=rows, attention=step == 20)
        logits, attention = expected.step(tokens, rows)
        np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4)
        if step == 20:
            np.testing.assert_allclose(output.attention, attention[:, : output.attention.shape[1]], atol=1e-5)
    assert decoded == [4] * 10 + [2] * 26 + [6] * 4


def test_candidates_are_the_likeliest_tokens_of_each_row(engine: OnnxEngine) -> None:
    source = source_batch()
    mask = source.ne(0).long().numpy()
    states = [engine.start(source.numpy(), mask, beams=2) for _ in range(2)]
    rows = np.array([1, 1, 2, 3, 5, 4])
    for given in (None, rows):
        tokens = np.arange(6) + 3
        logits = engine.step(states[0], tokens, rows=given).logits
        output = engine.step(states[1], tokens, rows=given, candidates=4)
        expected = torch.from_numpy(logits).log_softmax(dim=-1).topk(4)
        np.testing.assert_array_equal(output.candidate_ids, expected.indices)
        np.testing.assert_allclose(output.candidate_log_probs, expected.values, atol=1e-5)
        assert output.logits is None


def test_nothing_of_a_batch_stays_when_it_is_done(engine: OnnxEngine) -> None:
    source = source_batch()
    mask = source.ne(0).long().numpy()

    def decode() -> list[weakref.ref]:
        state = engine.start(source.numpy(), mask, beams=2)
        alive = [weakref.ref(state), *map(weakref.ref, state.source.values())]
        for step in range(40):
            if step == 20:
                engine.select(state, np.array([0, 2]))
            alive.append(weakref.ref(state.cache))
            tokens = np.arange(2 * len(state.shared)) % (2 if step > 5 else 1) + 5
            alive.append(weakref.ref(engine.step(state, tokens).logits))
        return alive

    # Freed at once, not when the collector of cycles comes by.
    gc.disable()
    try:
        for reference in decode():
            assert reference() is None
    finally:
        gc.enable()


def test_what_is_longer_than_learned_positions_is_refused(tmp_path: Path) -> None:
    model = tiny_model(num_experts=0, position_embedding_type="learned", max_position_embeddings=8)
    export_graphs(model, tmp_path / "graphs")
    engine = OnnxEngine(tmp_path / "graphs", threads=1)
    assert (engine.max_source_length, engine.max_target_length) == (8, 8)
    with pytest.raises(ValueError, match=r"source has 9 tokens.*8"):
        engine.start(np.ones((1, 9), np.int64), np.ones((1, 9), np.int64))
    state = engine.start(np.ones((1, 8), np.int64), np.ones((1, 8), np.int64))
    for _ in range(8):
        engine.step(state, np.array([5]))
    with pytest.raises(ValueError, match=r"target has 9 tokens.*8"):
        engine.step(state, np.array([5]))


def test_a_folder_without_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"graphs\.json"):
        OnnxEngine(tmp_path)


def test_int8_without_vnni_gives_the_same(
    model: SparseqForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_graphs(model, tmp_path / "graphs", precision="int8")
    source = source_batch().numpy()
    logits = []
    for overflows in (False, True):
        monkeypatch.setattr(onnx_engine, "_int8_overflows", lambda overflows=overflows: overflows)
        engine = OnnxEngine(tmp_path / "graphs", threads=1)
        state = engine.start(source, np.ones_like(source))
        logits.append(engine.step(state, np.array([5, 6, 7])).logits)
    # The products are the same whole numbers.
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [("x86_64", "avx2 fma", True), ("x86_64", "avx2 avx512_vnni", False), ("AMD64", "avx_vnni", False)],
)
def test_which_processors_overflow_in_int8(
    machine: str, flags: str, overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda path, **options: f"flags : {flags}")
    assert onnx_engine._int8_overflows() == overflows
