"""The engine over ONNX Runtime: runs the graphs that `sparseq.graphs.files.export_graphs` wrote, on the CPU."""

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..graphs.attention import HIDDEN
from ..graphs.files import read_record
from ..loading import first_line
from .engine import StepOutput

# Target tokens that a cache has room for; it doubles when they are used up, but grows by at most so many more. All of
# its room is read at every step; with less of it, it is moved more often.
_ROOM, _MORE_ROOM = 16, 32


@dataclass
class _State:
    """One batch being decoded.

    Rows lie in slots of the cache. A row that continues another takes over its slot where it is the first to do so;
    only what several rows continue is copied, into slots whose rows ended, from where the two begin to differ. So
    beams change places at the price of the last tokens of those that branch.

    As long as all rows of a source have the same tokens, as they have at the beginning, there is one for all of them.

    A step looks at the whole cache, at room that holds nothing yet too: memory is read more than twice as fast where
    nothing in it is left out, and by a bias that room counts for nothing. GroupQueryAttention writes the new token at
    the end of what it reads; it is moved behind the others before the next one comes.

    Attributes:
        beams: Rows of each source.
        width: Of these, how many are decoded: 1, or `beams` once they differ.
        source: What the encoder gave, by the name of its output: mask, cross keys and values.
        cache: Keys and values of all layers, `(layers * 2, B * width or more, K, capacity, P)`.
        bias: What is added to the scores of each place in it, `(1, 1, 1, capacity)`.
        slots: `(B * width,)`, the slot of each row. Slots of one source lie side by side, as its rows do.
        in_order: Whether each row lies in the slot of its own number.
        shared: `(B, beams, beams)`, how many first tokens two slots of a source are known to share.
        length: Tokens that the cache holds of each row.
        settled: Those of them that are not at the end for a step's sake.
        bindings: What each session reads and writes, by the session's name; made anew when an array is replaced.
    """

    beams: int
    source: dict[str, np.ndarray]
    cache: np.ndarray
    bias: np.ndarray
    slots: np.ndarray
    shared: np.ndarray
    width: int = 1
    in_order: bool = True
    length: int = 0
    settled: int = 0
    bindings: dict[str, "_Binding"] = field(default_factory=dict)

    def settle_last(self) -> None:
        """Move the last token behind those before it."""
        if self.settled < self.length:
            last, rows = self.length - 1, len(self.slots)
            self.cache[:, :rows, :, last] = self.cache[:, :rows, :, -1]
            self.bias[..., last] = 0
            self.settled = self.length

    def widen(self) -> None:
        """Give each row of a source a slot of its own."""
        sources, capacity = len(self.shared), self.cache.shape[3]
        self._lay_out(self.cache[:, :sources, :, : self.length].repeat(self.beams, axis=1), capacity)
        self.slots, self.width = np.arange(sources * self.beams), self.beams
        self.shared[:] = self.length

    def continue_rows(self, rows: np.ndarray) -> None:
        """Give each row the slot of the row that it continues, or a copy of it."""
        parents = self.slots[rows]
        slots, first = np.unique(parents, return_index=True)
        if len(slots) < len(parents):
            is_copy, is_free = np.ones(len(parents), dtype=bool), np.ones(len(parents), dtype=bool)
            is_copy[first] = False
            is_free[slots] = False
            # A source has as many free slots as rows without one, and both are in the order of the sources.
            (free,) = np.nonzero(is_free)
            for slot, parent in zip(free.tolist(), parents[is_copy].tolist(), strict=True):
                self._copy_slot(slot, parent)
            parents[is_copy] = free
        self.slots = parents
        self.in_order = np.array_equal(parents, np.arange(len(parents)))

    def _copy_slot(self, slot: int, other: int) -> None:
        """Make a slot hold what another slot of the same source holds."""
        source, place = divmod(slot, self.beams)
        shared, other_place = self.shared[source], other - source * self.beams
        different = slice(shared[place, other_place], self.length)
        self.cache[:, slot, :, different] = self.cache[:, other, :, different]
        shared[place] = shared[other_place]
        shared[:, place] = shared[:, other_place]
        shared[place, other_place] = shared[other_place, place] = self.length

    def make_room(self, number: int) -> None:
        """Give the cache room for so many more tokens."""
        self._lay_out(self.cache[:, : len(self.slots), :, : self.length], self.length + number)

    def _lay_out(self, tokens: np.ndarray, capacity: int) -> None:
        """Begin a new cache with these tokens, `(layers * 2, B * width, K, length, P)`."""
        # Zeros, since what holds nothing must be finite, or the bias would not hide it.
        self.cache = np.zeros((*tokens.shape[:3], capacity, tokens.shape[4]), dtype=np.float32)
        self.cache[:, :, :, : self.length] = tokens
        self.bias = _slot_bias(capacity, self.length)
        self.bindings.clear()

    def select(self, sources: np.ndarray) -> None:
        """Keep these sources, and move their slots together."""
        self.settle_last()
        kept = (sources[:, None] * self.width + np.arange(self.width)).reshape(-1)
        for slot, old in enumerate(kept.tolist()):
            if slot != old:
                self.cache[:, slot, :, : self.length] = self.cache[:, old, :, : self.length]
        moved = np.empty(len(self.slots), dtype=np.int64)
        moved[kept] = np.arange(len(kept))
        self.slots = moved[self.slots[kept]]
        self.shared = self.shared[sources]
        self.source = {name: array[sources] for name, array in self.source.items()}
        self.bindings.clear()


def _slot_bias(capacity: int, length: int) -> np.ndarray:
    """What hides all places of a cache but the first `length` and the last one."""
    bias = np.zeros((1, 1, 1, capacity), dtype=np.float32)
    bias[..., length:-1] = HIDDEN
    return bias


class _Binding:
    """Arrays that one session of the decoder reads and writes in place, step after step."""

    def __init__(self, session: ort.InferenceSession, state: _State):
        self._session = session
        rows = len(state.slots)
        capacity = state.cache.shape[3]
        self.tokens = np.zeros(rows, dtype=np.int64)
        self.position = np.zeros(1, dtype=np.int64)
        shapes = {output.name: output.shape for output in session.get_outputs()}
        self.logits = np.empty((rows, shapes["logits"][1]), dtype=np.float32)
        self.attention: np.ndarray | None = None
        outputs = {"logits": self.logits}
        if "attention" in shapes:
            self.attention = outputs["attention"] = np.empty((rows, state.source["source_mask"].shape[1]), np.float32)
        inputs = {
            "tokens": self.tokens,
            "position": self.position,
            "past_lengths": np.full(rows, capacity - 1, dtype=np.int32),
            "total_length": np.full(1, capacity, dtype=np.int32),
            "slot_bias": state.bias,
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

    def run(self, tokens: np.ndarray, by_slot: np.ndarray | slice, length: int) -> None:
        """Append a token to each row; what comes of it is in `logits` and `attention`, by slot."""
        self.tokens[by_slot] = tokens
        self.position[:] = length
        self._session.run_with_iobinding(self._binding)


class OnnxEngine:
    """An `Engine` over ONNX Runtime.

    Args:
        folder: Graphs that `export_graphs` wrote.
        threads: Threads of one operator; None leaves it to ONNX Runtime, which takes one for each core.

    Raises:
        FileNotFoundError: The folder holds no graphs.
        ValueError: They are of another version, or ONNX Runtime cannot read them.
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
        # What each batch needs, so that damaged files are found now.
        for name in ("encoder", "likeliest"):
            self._session(name)
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
        sources = len(input_ids)
        cache = np.zeros((2 * self._layers, sources, self._kv_heads, _ROOM, self._width), dtype=np.float32)
        shared = np.zeros((sources, beams, beams), dtype=np.int64)
        return _State(beams, source, cache, _slot_bias(_ROOM, 0), np.arange(sources), shared)

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
        state.settle_last()
        if state.width < state.beams:
            of_sources = tokens.reshape(-1, state.beams)
            if np.all(of_sources == of_sources[:, :1]):
                # Whichever rows of their source they continue.
                tokens, rows = of_sources[:, 0], None
            else:
                state.widen()
        if rows is not None:
            state.continue_rows(rows)
        if state.length == state.cache.shape[3]:
            state.make_room(min(state.length, _MORE_ROOM))
        name = "step_attention" if attention else "step"
        if name not in state.bindings:
            state.bindings[name] = _Binding(self._session(name), state)
        binding = state.bindings[name]
        by_slot = slice(None) if state.in_order else state.slots
        binding.run(tokens, by_slot, state.length)
        state.length += 1

        def by_row(by_slots: np.ndarray) -> np.ndarray:
            own: np.ndarray = by_slots[by_slot]
            return own if state.width == state.beams else own.repeat(state.beams, axis=0)

        weights = None if binding.attention is None else by_row(binding.attention)
        if not candidates:
            return StepOutput(logits=by_row(binding.logits), attention=weights)
        feed = {"logits": binding.logits, "number": np.array([candidates])}
        ids, log_probs = self._session("likeliest").run(["ids", "log_probs"], feed)
        return StepOutput(candidate_ids=by_row(ids), candidate_log_probs=by_row(log_probs), attention=weights)

    def select(self, state: _State, sources: np.ndarray) -> None:
        """As `Engine.select`."""
        state.select(np.asarray(sources))

    def _session(self, name: str) -> ort.InferenceSession:
        if name not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads or 0
            options.inter_op_num_threads = 1
            # The graphs are written with the operators to run: more fusion made them slower.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            if self._record["precision"] == "int8" and _int8_overflows():
                # Unsigned weights at half the speed; the option acts among the extended optimisations.
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
                options.add_session_config_entry("session.x64quantprecision", "1")
            path = str(self._folder / f"{name}.onnx")
            try:
                self._sessions[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            # Its errors have no class of their own in common.
            except Exception as error:
                raise ValueError(f"ONNX Runtime cannot read {path}: {first_line(error)}") from error
        return self._sessions[name]


def _int8_overflows() -> bool:
    """Whether sums of products of 8 bits may exceed their 16 bits: on x86-64 without VNNI instructions."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return re.search(r"\b(avx512_vnni|avx_vnni)\b", flags) is None


def _check_length(length: int, limit: int | None, what: str) -> None:
    if limit is not None and length > limit:
        raise ValueError(
            f"The {what} has {length} tokens, but the model's learned positions end at `max_position_embeddings` = "
            f"{limit}; shorten it"
        )
