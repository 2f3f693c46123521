"""The engine over ONNX Runtime: runs the graphs that `sparseq.graphs.files.export_graphs` wrote, on the CPU."""

import platform
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnxruntime as ort

from ..graphs.files import read_record
from ..loading import first_line
from .engine import StepOutput

# Target tokens that a cache has room for, and as many more whenever they are used up. A cache with more room than that
# is slower to read, one with less is moved more often.
_ROOM = 32


class _State(ABC):
    """One batch being decoded.

    Attributes:
        per_source: Rows of each source.
        source: What the encoder gave, by the name of its output: mask, cross keys and values.
        cache: Keys and values of all layers, `(layers * 2, R or more, K, capacity, P)`.
        length: Tokens of each row.
        bindings: What each session reads and writes, by the session's name; made anew when an array is replaced.
    """

    # The graph that runs its steps.
    graph: ClassVar[str]

    def __init__(self, source: dict[str, np.ndarray], per_source: int, cache: np.ndarray) -> None:
        self.source = source
        self.per_source = per_source
        self.cache = cache
        self.length = 0
        self.bindings: dict[str, _Binding] = {}

    @property
    def sources(self) -> int:
        """B."""
        return len(self.source["source_mask"])

    @property
    def rows(self) -> int:
        """R."""
        return self.sources * self.per_source

    @property
    @abstractmethod
    def inputs(self) -> dict[str, np.ndarray]:
        """What the graph is told of a step, beside tokens, caches and sources."""

    def prepare(self, rows: np.ndarray | None) -> None:
        """Make everything ready for one more token of each row.

        Args:
            rows: The row that each continues; None for itself.
        """
        if self.length == self.cache.shape[3]:
            self._grow(self.length + _ROOM)
        self.length += 1

    def select(self, sources: np.ndarray) -> None:
        """Keep these sources."""
        kept = (sources[:, None] * self.per_source + np.arange(self.per_source)).reshape(-1)
        for place, old in enumerate(kept.tolist()):
            if place != old:
                self.cache[:, place, :, : self.length] = self.cache[:, old, :, : self.length]
        self.source = {name: array[sources] for name, array in self.source.items()}
        self.bindings.clear()

    def _grow(self, capacity: int) -> None:
        """Give the caches room for so many tokens."""
        layers, _, kv_heads, _, width = self.cache.shape
        grown = np.empty((layers, self.rows, kv_heads, capacity, width), dtype=np.float32)
        grown[:, :, :, : self.length] = self.cache[:, : self.rows, :, : self.length]
        self.cache = grown
        self.bindings.clear()


class _Rows(_State):
    """Rows that each go on by themselves."""

    graph = "step"

    def __init__(self, source: dict[str, np.ndarray], per_source: int, cache: np.ndarray) -> None:
        super().__init__(source, per_source, cache)
        self._past_lengths = np.zeros(self.rows, dtype=np.int32)
        self._total_length = np.zeros(1, dtype=np.int32)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {"past_lengths": self._past_lengths, "total_length": self._total_length}

    def prepare(self, rows: np.ndarray | None) -> None:
        if rows is not None:
            raise ValueError("These rows do not branch: start them with `branching=True`")
        self._past_lengths[:] = self.length
        self._total_length[:] = self.length + 1
        super().prepare(rows)

    def select(self, sources: np.ndarray) -> None:
        super().select(sources)
        self._past_lengths = np.zeros(self.rows, dtype=np.int32)


class _Branches(_State):
    """Rows that branch, as beams do.

    The keys and values of a token stay in the row that was fed it, and the rows that descend from it know which that
    is. So a row takes another's place without anything being moved.
    """

    graph = "branching_step"

    def __init__(self, source: dict[str, np.ndarray], per_source: int, cache: np.ndarray) -> None:
        super().__init__(source, per_source, cache)
        self._position = np.zeros(1, dtype=np.int32)
        # By source, row and token: the row of the source that was fed it.
        self._origins = np.zeros((self.sources, per_source, cache.shape[3]), dtype=np.int32)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {"position": self._position, "origins": self._origins}

    def prepare(self, rows: np.ndarray | None) -> None:
        if rows is not None:
            by_row = self._origins.reshape(self.rows, -1)[:, : self.length]
            by_row[:] = by_row[rows]
        self._position[:] = self.length
        super().prepare(rows)
        self._origins[:, :, self.length - 1] = np.arange(self.per_source)

    def select(self, sources: np.ndarray) -> None:
        super().select(sources)
        self._origins = self._origins[sources]

    def _grow(self, capacity: int) -> None:
        super()._grow(capacity)
        missing = capacity - self._origins.shape[2]
        self._origins = np.pad(self._origins, [(0, 0), (0, 0), (0, missing)])


class _Binding:
    """Arrays that one session of the decoder reads and writes in place, step after step."""

    def __init__(self, session: ort.InferenceSession, state: _State):
        self._session = session
        self._tokens = np.zeros(state.rows, dtype=np.int64)
        shapes = {output.name: output.shape for output in session.get_outputs()}
        self.logits = np.empty((state.rows, shapes["logits"][1]), dtype=np.float32)
        self.attention: np.ndarray | None = None
        outputs = {"logits": self.logits}
        if "attention" in shapes:
            length = state.source["source_mask"].shape[1]
            self.attention = outputs["attention"] = np.empty((state.rows, length), dtype=np.float32)
        inputs = {"tokens": self._tokens, **state.inputs, **state.source}
        caches = {
            f"{('key', 'value')[number % 2]}_{number // 2}": buffer[: state.rows]
            for number, buffer in enumerate(state.cache)
        }
        inputs |= {f"past_{name}": buffer for name, buffer in caches.items()}
        # One buffer for both: new tokens are written into the past.
        outputs |= {name: caches[name.partition("_")[2]] for name in shapes if name.startswith("present")}
        # Values do not own the arrays they are made of.
        self._arrays = (inputs, outputs)
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))

    def run(self, tokens: np.ndarray) -> None:
        """Append a token to each row; what comes of it is in `logits` and `attention`."""
        self._tokens[:] = tokens
        self._session.run_with_iobinding(self._binding)


class OnnxEngine:
    """An `Engine` over ONNX Runtime.

    Args:
        folder: Graphs that `export_graphs` wrote.
        threads: Threads of one operator; None leaves it to ONNX Runtime, which takes one for each core.

    Raises:
        FileNotFoundError: The folder holds no graphs.
        ValueError: They are of another version or damaged, or ONNX Runtime cannot read them.
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
        # What each batch needs; of the steps, each when it is needed, since it holds the weights once more.
        for name in ("encoder", "likeliest"):
            self._session(name)
        # (K, P) of each layer's keys and values.
        inputs = self._record["graphs"]["step"]["inputs"]
        caches = [shape for name, (_, shape) in inputs.items() if name.startswith("past_key_")]
        self._layers, (_, self._kv_heads, _, self._width) = len(caches), caches[0]

    def start(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, *, per_source: int = 1, branching: bool = False
    ) -> _State:
        """As `Engine.start`.

        Raises:
            ValueError: The source is longer than the model's learned positions.
        """
        _check_length(input_ids.shape[1], self.max_source_length, "source")
        encoder = self._session("encoder")
        names = [output.name for output in encoder.get_outputs()]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        source = dict(zip(names, encoder.run(names, feed), strict=True))
        rows = len(input_ids) * per_source
        cache = np.empty((2 * self._layers, rows, self._kv_heads, _ROOM, self._width), dtype=np.float32)
        return (_Branches if branching else _Rows)(source, per_source, cache)

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
            ValueError: The target is longer than the model's learned positions, or the rows do not branch.
        """
        _check_length(state.length + 1, self.max_target_length, "target")
        state.prepare(rows)
        name = f"{state.graph}_attention" if attention else state.graph
        if name not in state.bindings:
            state.bindings[name] = _Binding(self._session(name), state)
        binding = state.bindings[name]
        binding.run(tokens)
        if not candidates:
            return StepOutput(logits=binding.logits, attention=binding.attention)
        feed = {"logits": binding.logits, "number": np.array([candidates])}
        ids, log_probs = self._session("likeliest").run(["ids", "log_probs"], feed)
        return StepOutput(candidate_ids=ids, candidate_log_probs=log_probs, attention=binding.attention)

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
