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
                position=np.array([length]),
                past_lengths=np.full(len(target), length, np.int32),
                total_length=np.array([length + 1], np.int32),
                slot_bias=np.zeros((1, 1, 1, length + 1), np.float32),
                **encoded,
                **past,
            )
            logits.append(state["logits"])
            attention.append(state["attention"])
        return np.stack(logits, axis=1), np.stack(attention, axis=1)
