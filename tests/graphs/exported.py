"""Exported graphs run by plain ONNX Runtime, as their record describes them."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort


class ExportedModel:
    """Encoder, prefill and decode step of a folder of graphs, with caches that grow by concatenation."""

    def __init__(self, folder: Path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.record = json.loads((folder / "graphs.json").read_text())
        self.options = options
        self.folder = folder

    def run(self, graph: str, **values: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of a graph by name; of `values`, those that it takes."""
        described = self.record["graphs"][graph]
        path = str(self.folder / described["file"])
        session = ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        feed = {name: values[name] for name in described["inputs"]}
        for name, (dtype, shape) in described["inputs"].items():
            assert feed[name].dtype == dtype
            assert feed[name].ndim == len(shape)
        return dict(zip(described["outputs"], session.run(list(described["outputs"]), feed), strict=True))

    def decode(
        self, source: np.ndarray, mask: np.ndarray, target: np.ndarray, prefix: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits `(B, T - prefix + 1, V)` from the last token of the prefix on, and attention `(B, T - prefix, S)`."""
        encoded = self.run("encoder", input_ids=source, attention_mask=mask)
        state = self.run("prefill", tokens=target[:, :prefix], **encoded)
        logits, attention = [state["logits"]], []
        for length in range(prefix, target.shape[1]):
            past = {name.replace("present", "past"): value for name, value in state.items() if "present" in name}
            state = self.run(
                "step_attention",
                tokens=target[:, length],
                past_lengths=np.full(len(target), length, np.int32),
                total_length=np.array([length + 1], np.int32),
                **encoded,
                **past,
            )
            logits.append(state["logits"])
            attention.append(state["attention"])
        return np.stack(logits, axis=1), np.stack(attention, axis=1)

    def branch(
        self, source: np.ndarray, mask: np.ndarray, tokens: np.ndarray, parents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps of R rows that branch, in buffers that are read and written.

        Args:
            source, mask: `(B, S)`.
            tokens: What each row is fed, `(R, T)`.
            parents: Which row of its source it continues with that, `(R, T)`.

        Returns:
            Logits `(R, T, V)` and attention `(R, T, S)`.
        """
        name = "branching_step_attention"
        described = self.record["graphs"][name]
        session = ort.InferenceSession(
            str(self.folder / described["file"]), self.options, providers=["CPUExecutionProvider"]
        )
        encoded = self.run("encoder", input_ids=source, attention_mask=mask)
        rows, length = tokens.shape
        beams = rows // len(source)
        origins = np.zeros((len(source), beams, length), dtype=np.int32)
        buffers = {
            # What was never written is not read.
            name: np.full((rows, shape[1], length, shape[3]), np.nan, dtype=np.float32)
            for name, (_, shape) in described["inputs"].items()
            if name.startswith("past_")
        }
        logits, attention = [], []
        for position in range(length):
            lines = origins.reshape(rows, length)
            lines[:] = lines[parents[:, position] + np.arange(rows) // beams * beams]
            origins[:, :, position] = np.arange(beams)
            binding = session.io_binding()
            feed = {"tokens": tokens[:, position].copy(), "position": np.array([position], np.int32)}
            for name, array in (encoded | buffers | feed | {"origins": origins}).items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for name in ("logits", "attention"):
                binding.bind_output(name)
            for name in described["outputs"]:
                if name.startswith("present"):
                    array = buffers["past_" + name.partition("_")[2]]
                    binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
            session.run_with_iobinding(binding)
            for values, output in zip((logits, attention), binding.get_outputs(), strict=False):
                values.append(output.numpy())
        return np.stack(logits, axis=1), np.stack(attention, axis=1)
