"""The engine over ONNX Runtime: runs the graphs that `sparseq.graphs.files.export_graphs` wrote, on the CPU."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..graphs.files import read_record
from .engine import StepOutput

# Target tokens that a cache has room for at first; it doubles when they are used up.
_FIRST_CAPACITY = 32


@dataclass
class _State:
    """One batch being decoded.

    Rows lie in slots of the cache. A row that continues another takes over its slot where it is the first to do so;
    only what several rows continue is copied, into slots whose rows ended. So beams change places at the price of
    those that branch.

    Attributes:
        beams: Rows of each source.
        source: What the encoder gave, by the name of its output: mask, cross keys and values.
        cache: Keys and values of all layers, `(layers * 2, R, K, capacity, P)`.
        slots: `(R,)`, the slot of each row. Slots of one source lie side by side, as its rows do.
        length: Tokens that the cache holds of each row.
        bindings: What each session reads and writes, by the session's name; made anew when an array is replaced.
    """

    beams: int
    source: dict[str, np.ndarray]
    cache: np.ndarray
    slots: np.ndarray
    length: int = 0
    bindings: dict[str, "_Binding"] = field(default_factory=dict)


class _Binding:
    """Arrays that one session of the decoder reads and writes in place, step after step."""

    def __init__(self, session: ort.InferenceSession, state: _State):
        self._session = session
        rows = len(state.slots)
        self.tokens = np.zeros(rows, dtype=np.int64)
        self.past_lengths = np.zeros(rows, dtype=np.int32)
        self.total_length = np.zeros(1, dtype=np.int32)
        names = [output.name for output in session.get_outputs()]
        shapes = {output.name: output.shape for output in session.get_outputs()}
        self.logits = np.empty((rows, shapes["logits"][1]), dtype=np.float32)
        self.attention: np.ndarray | None = None
        outputs = {"logits": self.logits}
        if "attention" in names:
            self.attention = outputs["attention"] = np.empty((rows, state.source["source_mask"].shape[1]), np.float32)
        inputs = {
            "tokens": self.tokens,
            "past_lengths": self.past_lengths,
            "total_length": self.total_length,
            **state.source,
        }
        for number, buffer in enumerate(state.cache):
            name = f"{('key', 'value')[number % 2]}_{number // 2}"
            # One buffer for both: the new token is written into the past.
            inputs[f"past_{name}"] = outputs[f"present_{name}"] = buffer[:rows]
        # Values do not own the arrays they are made of.
        self._arrays = (inputs, outputs)
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))

    def run(self, tokens: np.ndarray, slots: np.ndarray, length: int) -> None:
        self.tokens[slots] = tokens
        self.past_lengths[:] = length
        self.total_length[:] = length + 1
        self._session.run_with_iobinding(self._binding)


class OnnxEngine:
    """An `Engine` over ONNX Runtime.

    Args:
        folder: Graphs that `export_graphs` wrote.
        threads: Threads of one operator; None leaves it to ONNX Runtime, which takes one for each core.

    Raises:
        FileNotFoundError: The folder holds no graphs.
        ValueError: They are of another version.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        self._folder = Path(folder)
        self._threads = threads
        self._record = read_record(self._folder)
        config = self._record["config"]
        self.vocab_size: int = config["vocab_size"]
        limit = config["max_position_embeddings"] if config["position_embedding_type"] == "learned" else None
        self.max_source_length: int | None = limit
        self.max_target_length: int | None = limit
        self._sessions: dict[str, ort.InferenceSession] = {}
        step = self._session("step")
        # (K, P) of each layer's keys and values.
        caches = [value for value in step.get_inputs() if value.name.startswith("past_key_")]
        self._layers = len(caches)
        self._kv_heads, self._width = caches[0].shape[1], caches[0].shape[3]

    def start(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, beams: int = 1) -> _State:
        """As `Engine.start`.

        Raises:
            ValueError: The source is longer than the model's learned positions.
        """
        _check_length(input_ids.shape[1], self.max_source_length, "source")
        encoder = self._session("encoder")
        names = [output.name for output in encoder.get_outputs()]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        source = dict(zip(names, encoder.run(names, feed), strict=True))
        rows = len(input_ids) * beams
        return _State(beams, source, self._new_cache(rows, _FIRST_CAPACITY), np.arange(rows))

    def step(
        self,
        state: _State,
        tokens: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        candidates: int = 0,
        attention: bool = False,
    ) -> StepOutput:
        """As `Engine.step`. What is returned may be overwritten by the next step.

        Raises:
            ValueError: The target is longer than the model's learned positions.
        """
        _check_length(state.length + 1, self.max_target_length, "target")
        if rows is not None:
            self._continue_rows(state, rows)
        if state.length == state.cache.shape[3]:
            grown = self._new_cache(state.cache.shape[1], 2 * state.length)
            grown[:, :, :, : state.length] = state.cache
            state.cache = grown
            state.bindings.clear()
        name = "step_attention" if attention else "step"
        if name not in state.bindings:
            state.bindings[name] = _Binding(self._session(name), state)
        binding = state.bindings[name]
        binding.run(tokens, state.slots, state.length)
        state.length += 1
        moved = not np.array_equal(state.slots, np.arange(len(state.slots)))
        by_row: Any = state.slots if moved else slice(None)
        weights = None if binding.attention is None else binding.attention[by_row]
        if not candidates:
            return StepOutput(logits=binding.logits[by_row], attention=weights)
        feed = {"logits": binding.logits, "number": np.array([candidates])}
        ids, scores = self._session("likeliest").run(["ids", "log_probs"], feed)
        return StepOutput(candidate_ids=ids[by_row], candidate_log_probs=scores[by_row], attention=weights)

    def select(self, state: _State, sources: np.ndarray) -> None:
        """As `Engine.select`."""
        kept = np.zeros(len(state.slots) // state.beams, dtype=bool)
        kept[sources] = True
        old = (np.asarray(sources)[:, None] * state.beams + np.arange(state.beams)).reshape(-1)
        for new_slot, slot in enumerate(old):
            if new_slot != slot:
                state.cache[:, new_slot, :, : state.length] = state.cache[:, slot, :, : state.length]
        moves = np.zeros(len(state.slots), dtype=np.int64)
        moves[old] = np.arange(len(old))
        state.slots = moves[state.slots[old]]
        state.source = {name: array[sources] for name, array in state.source.items()}
        state.bindings.clear()

    def _continue_rows(self, state: _State, rows: np.ndarray) -> None:
        """Give each row the slot of the row that it continues, or a copy of it."""
        parents = state.slots[rows]
        slots, first = np.unique(parents, return_index=True)
        if len(slots) < len(parents):
            is_copy = np.ones(len(parents), dtype=bool)
            is_copy[first] = False
            is_free = np.ones(len(parents), dtype=bool)
            is_free[slots] = False
            # A source has as many free slots as rows without one, and both are in the order of the sources.
            (free,) = np.nonzero(is_free)
            copied = parents[is_copy]
            for slot, parent in zip(free, copied, strict=True):
                state.cache[:, slot, :, : state.length] = state.cache[:, parent, :, : state.length]
            parents[is_copy] = free
        state.slots = parents

    def _new_cache(self, rows: int, capacity: int) -> np.ndarray:
        return np.zeros((2 * self._layers, rows, self._kv_heads, capacity, self._width), dtype=np.float32)

    def _session(self, name: str) -> ort.InferenceSession:
        if name not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads or 0
            options.inter_op_num_threads = 1
            # The graphs are written with the operators to run: more fusion made them slower.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            path = str(self._folder / f"{name}.onnx")
            self._sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self._sessions[name]


def _check_length(length: int, limit: int | None, what: str) -> None:
    if limit is not None and length > limit:
        raise ValueError(
            f"The {what} has {length} tokens, but the model's learned positions end at `max_position_embeddings` = "
            f"{limit}; shorten it"
        )
