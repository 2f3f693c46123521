"""A Sparseq model as a folder of programs of torch.export."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from sparseq.conversion.exporting import Checkpoint, ProgramExport
from sparseq.conversion.likelihood import position_limit
from sparseq.conversion.runtime_readme import GreedyProgram, language_note
from sparseq.conversion.torch_programs import export_programs, head_dim
from sparseq.loading import load_model

_README = """\
# A Sparseq model for torch.export

```python
import torch
{tokenizer}
{constants}
encoder = torch.export.load("encoder.pt2").module()
decoder = torch.export.load("decoder.pt2").module()


@torch.no_grad()
def generate(input_ids, attention_mask):
    \"\"\"Greedy search: for lists of source tokens, all of one length, lists of target tokens.\"\"\"
    source, mask = torch.tensor(input_ids), torch.tensor(attention_mask)
    cross_cache = encoder(input_ids=source, attention_mask=mask)
    self_cache = [torch.zeros(len(source), {kv_heads}, 0, {width}, dtype=torch.{dtype})] * {tensors}
    tokens = torch.tensor([FIRST] * len(source))
    written = tokens[:, 1:]
    is_finished = torch.zeros(len(source), 1, dtype=torch.bool)
    while written.shape[1] < MAX_NEW_TOKENS and not is_finished.all():
        logits, self_cache = decoder(
            decoder_input_ids=tokens, attention_mask=mask, self_cache=self_cache, cross_cache=cross_cache
        )
        tokens = logits[:, -1].argmax(dim=-1, keepdim=True).masked_fill(is_finished, PAD)
        written = torch.cat([written, tokens], dim=1)
        is_finished |= torch.isin(tokens, torch.tensor(ENDS))
    return written.tolist()
{call}```

- `encoder.pt2` takes `input_ids` and `attention_mask`, `(B, S)` int64, and gives the cross cache: {tensors} tensors
  `(B, {kv_heads}, S, {width})`, keys and values of each layer by turns.
- `decoder.pt2` takes `decoder_input_ids` `(B, T)` int64, `attention_mask` `(B, S)`, `self_cache`, {tensors} tensors
  `(B, {kv_heads}, P, {width})` for the P tokens before these, and `cross_cache`. It gives logits
  `(B, T, {vocab_size})` and the self cache for the next call. It takes a whole target at once (prefill, P = 0) or one
  token after the other (T = 1): B, S, T and P are any sizes{limit}.

{languages}Caches and logits are in {dtype}. For beams, repeat the rows, and reorder the self cache with
`index_select(0, rows)`. The programs need nothing but torch. They were traced on the CPU;
`torch.export.passes.move_to_device_pass` is torch's way to another device. generation_config.json has the settings of
`generate()`, of which the program above takes special tokens and the longest length.
"""


@dataclass(frozen=True)
class TorchExport(ProgramExport):
    """Programs of torch.export."""

    @classmethod
    def prepared(cls, checkpoint: Checkpoint, *, dtype: str | None) -> "TorchExport":
        """
        Args:
            checkpoint: A Sparseq model.
            dtype: Name of a data type to compute in; None keeps that of the weights.

        Raises:
            ValueError: The weights cannot be read.
        """
        kind = getattr(torch, dtype) if dtype else "auto"
        model: Any = load_model(AutoModelForSeq2SeqLM, checkpoint.folder, dtype=kind)
        return cls(checkpoint, model.eval())

    @property
    def readme(self) -> str:
        config, tokenizer = self.checkpoint.config, self.checkpoint.tokenizer()
        program = GreedyProgram.of(self.checkpoint.folder, self.checkpoint.generation_config, tokenizer)
        longest = position_limit(config)
        return _README.format(
            tokenizer=program.tokenizer,
            constants=program.constants,
            call=program.call,
            kv_heads=config.decoder_num_key_value_heads,
            width=head_dim(config),
            tensors=2 * config.decoder_layers,
            vocab_size=config.vocab_size,
            dtype=_name(self.model.dtype),
            languages=language_note(tokenizer),
            limit="" if longest is None else f", with at most {longest} positions in all",
        )

    def report(self) -> Iterable[str]:
        yield f"{self.checkpoint.config.num_parameters():,} parameters in {_name(self.model.dtype)}, in two programs."
        yield from self.checkpoint.notes

    def write_weights(self, folder: Path) -> None:
        for name, program in export_programs(self.model).items():
            torch.export.save(program, folder / f"{name}.pt2")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
