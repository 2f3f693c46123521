"""A slow and obvious `Engine` over the PyTorch model, for tests of what searches over an engine do."""

from dataclasses import dataclass

import numpy as np
import torch

from sparseq import SparseqForConditionalGeneration
from sparseq.translation.engine import StepOutput


@dataclass
class TorchState:
    """Sources and the tokens of each row so far, which every step computes anew."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    beams: int
    tokens: torch.Tensor


class TorchEngine:
    """Runs the whole encoder and decoder at each step.

    Attributes:
        asked: What steps were asked for: the number of candidates, 0 for logits.
        row_counts: How many rows each step had.
    """

    def __init__(self, model: SparseqForConditionalGeneration) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size
        is_learned = model.config.position_embedding_type == "learned"
        self.max_source_length = self.max_target_length = model.config.max_position_embeddings if is_learned else None
        self.asked: list[int] = []
        self.row_counts: list[int] = []

    def start(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, beams: int = 1) -> TorchState:
        tokens = torch.zeros(len(input_ids) * beams, 0, dtype=torch.int64)
        return TorchState(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), beams, tokens)

    @torch.no_grad()
    def step(
        self,
        state: TorchState,
        tokens: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        candidates: int = 0,
        attention: bool = False,
    ) -> StepOutput:
        if rows is not None:
            own = np.arange(len(rows)) // state.beams
            np.testing.assert_array_equal(rows // state.beams, own, "a row continues only rows of its own source")
            state.tokens = state.tokens[torch.from_numpy(rows)]
        state.tokens = torch.cat([state.tokens, torch.from_numpy(tokens)[:, None]], dim=1)
        self.asked.append(candidates)
        self.row_counts.append(len(tokens))
        output = self.model(
            input_ids=state.input_ids.repeat_interleave(state.beams, dim=0),
            attention_mask=state.mask.repeat_interleave(state.beams, dim=0),
            decoder_input_ids=state.tokens,
            use_cache=False,
            output_attentions=attention,
        )
        logits = output.logits[:, -1].clone()
        weights = output.cross_attentions[max(-2, -len(output.cross_attentions))] if attention else None
        seen = None if weights is None else weights[:, :, -1].mean(dim=1).numpy()
        if not candidates:
            return StepOutput(logits=logits.numpy(), attention=seen)
        top = logits.log_softmax(dim=-1).topk(candidates)
        return StepOutput(candidate_ids=top.indices.numpy(), candidate_log_probs=top.values.numpy(), attention=seen)

    def select(self, state: TorchState, sources: np.ndarray) -> None:
        assert (np.diff(sources) > 0).all()
        kept = torch.from_numpy(sources)
        state.input_ids, state.mask = state.input_ids[kept], state.mask[kept]
        state.tokens = state.tokens.unflatten(0, (-1, state.beams))[kept].flatten(0, 1)
