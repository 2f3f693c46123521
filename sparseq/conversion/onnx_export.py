"""A Sparseq model as a folder of ONNX graphs, with what a program needs that has ONNX Runtime and nothing of ours."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from sparseq.conversion.exporting import Checkpoint, ProgramExport
from sparseq.conversion.runtime_readme import GreedyProgram, language_note
from sparseq.graphs.files import Precision, export_graphs
from sparseq.graphs.heads import padded_width
from sparseq.loading import load_model

_README = """\
# A Sparseq model for ONNX Runtime

```python
import numpy as np
import onnxruntime
{tokenizer}
{constants}
sessions = {{name: onnxruntime.InferenceSession(f"{{name}}.onnx") for name in ("encoder", "prefill", "step")}}


def run(name, **inputs):
    outputs = [output.name for output in sessions[name].get_outputs()]
    return dict(zip(outputs, sessions[name].run(outputs, inputs)))


def generate(input_ids, attention_mask):
    \"\"\"Greedy search: for lists of source tokens, all of one length, lists of target tokens.\"\"\"
    source = run("encoder", input_ids=np.array(input_ids), attention_mask=np.array(attention_mask))
    tokens = np.array([FIRST] * len(input_ids))
    written, length = tokens[:, 1:], len(FIRST)
    is_finished = np.zeros(len(tokens), dtype=bool)
    outputs = run("prefill", tokens=tokens, **source)
    while True:
        next_tokens = np.where(is_finished, PAD, outputs.pop("logits").argmax(axis=-1))
        written = np.concatenate([written, next_tokens[:, None]], axis=1)
        is_finished |= np.isin(next_tokens, ENDS)
        if is_finished.all() or written.shape[1] >= MAX_NEW_TOKENS:
            return written.tolist()
        past = {{name.replace("present", "past"): value for name, value in outputs.items()}}
        slots = {{
            "past_lengths": np.full(len(tokens), length, np.int32),
            "total_length": np.array([length + 1], np.int32),
            "slot_bias": np.zeros((1, 1, 1, length + 1), np.float32),
        }}
        outputs = run("step", tokens=next_tokens, position=np.array([length]), **slots, **past, **source)
        length += 1
{call}```

- `encoder.onnx` takes `input_ids` and `attention_mask`, `(B, S)` int64. It gives `source_mask` `(B, S)` int32, and of
  each decoder layer i `cross_key_i` and `cross_value_i`, `(B, {kv_heads}, S, {width})`.
- `prefill.onnx` takes `tokens` `(R, T)` int64 and all that the encoder gives. It gives `logits` `(R, {vocab_size})`
  after the last token, and of each layer `present_key_i` and `present_value_i`, `(R, {kv_heads}, T, {width})`.
- `step.onnx` takes `tokens` `(R,)` and `position` `(1,)` int64, the number of tokens before these, `past_key_i` and
  `past_value_i`, and all that the encoder gives; `past_lengths` `(R,)` and `total_length` `(1,)` int32, the numbers of
  slots of the cache before these and with them, and `slot_bias` `(1, 1, 1, total_length)` float32, which is added to
  the scores of each slot: 0, or -1e30 for one that is to be overlooked. It gives `logits`, `present_key_i` and
  `present_value_i`.
- `step_attention.onnx` gives cross-attention besides, `attention` `(R, S)`; `likeliest.onnx` finds the likeliest
  tokens among logits.

{languages}B sources are decoded in R rows, R = B times the number of beams, rows of one source side by side. For
beams, reorder the rows of `present_*`; what the encoder gives stays as it is, once for each source. Where one buffer
`(R, {kv_heads}, capacity, {width})` is bound to a `past_*` and to its `present_*` (`io_binding`), a step writes its
token into slot `past_lengths` and copies nothing.

The weights of all graphs are in `weights.bin`, {stored}. graphs.json names all inputs
and outputs and has the configuration, generation_config.json the settings of `generate()`, of which the program above
takes special tokens and the longest length. `sparseq.Translator` runs the same graphs with all settings, beams among
them, and makes them from the checkpoint by itself.
"""
_STORED = {
    "float32": "in float32",
    "int8": "those of linear layers, experts and embeddings in 8 bits",
}


@dataclass(frozen=True)
class OnnxExport(ProgramExport):
    """ONNX graphs.

    Attributes:
        precision: What the weights are stored as.
    """

    precision: Precision

    @classmethod
    def prepared(cls, checkpoint: Checkpoint, *, precision: Precision) -> "OnnxExport":
        """
        Args:
            checkpoint: A Sparseq model.
            precision: As `export_graphs`.

        Raises:
            ValueError: The weights cannot be read.
        """
        model: Any = load_model(AutoModelForSeq2SeqLM, checkpoint.folder, dtype=torch.float32)
        return cls(checkpoint, model.eval(), precision)

    @property
    def readme(self) -> str:
        config, tokenizer = self.checkpoint.config, self.checkpoint.tokenizer()
        program = GreedyProgram.of(self.checkpoint.folder, self.checkpoint.generation_config, tokenizer)
        return _README.format(
            tokenizer=program.tokenizer,
            constants=program.constants,
            call=program.call,
            kv_heads=config.decoder_num_key_value_heads,
            width=padded_width(config.d_model // config.decoder_attention_heads),
            vocab_size=config.vocab_size,
            languages=language_note(tokenizer),
            stored=_STORED[self.precision],
        )

    def report(self) -> Iterable[str]:
        yield f"{self.checkpoint.config.num_parameters():,} parameters as ONNX graphs, {_STORED[self.precision]}."
        yield from self.checkpoint.notes

    def write_weights(self, folder: Path) -> None:
        # Graphs come in a folder of their own, complete or not there.
        graphs = folder / "graphs"
        export_graphs(self.model, graphs, precision=self.precision)
        for path in graphs.iterdir():
            path.rename(folder / path.name)
        graphs.rmdir()
