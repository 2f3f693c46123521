"""Decoding with `generate()`: where ONNX Runtime is missing or not wanted, and on accelerators."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from sparseq.training.evaluation import evaluating
from sparseq.translation.backend import Batch, Hypothesis, OnToken


class GenerateBackend:
    """`Backend` over `model.generate()`.

    Sentences whose prefixes differ in length are decoded apart, since `generate()` takes prefixes of one length. On an
    accelerator the cache is static, which is what `generate()` compiles.

    Args:
        model: A sequence-to-sequence model, on the device where it is to run. One object must not decode in two
            threads at once: the model holds the settings while it decodes.
    """

    name = "generate()"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def decode(
        self, batch: Batch, settings: GenerationConfig, *, attention: bool = False, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        """As `Backend.decode`; `seed`, if the settings have one, leaves the global random state as it was."""
        if on_token is not None and max(settings.num_beams or 1, settings.num_return_sequences or 1) > 1:
            raise ValueError("Tokens are streamed with `num_beams=1` and `num_return_sequences=1` only.")
        groups: dict[int, list[int]] = defaultdict(list)
        for row, prefix in enumerate(batch.prefixes):
            groups[len(prefix)].append(row)
        results: dict[int, list[Hypothesis]] = {}
        seed = getattr(settings, "seed", None)
        with self._settings(settings), _seeded(seed, self._model.device), evaluating(self._model):
            for rows in groups.values():
                found = self._decode_group(batch, rows, attention, on_token, settings.length_penalty)
                results.update(zip(rows, found, strict=True))
        return [results[row] for row in range(len(batch.prefixes))]

    @torch.inference_mode()
    def _decode_group(
        self,
        batch: Batch,
        rows: Sequence[int],
        attention: bool,
        on_token: OnToken | None,
        length_penalty: float | None,
    ) -> list[list[Hypothesis]]:
        """Hypotheses of sentences whose prefixes have the same length."""
        settings = self._model.generation_config
        inputs = self._inputs(batch, rows)
        ends = _end_ids(settings)
        beams, best = settings.num_beams or 1, settings.num_return_sequences or 1
        scores = _ChosenScores(max(beams, best), ends, are_log_probs=beams > 1)
        streamer = _Streamer(on_token, rows, ends) if on_token else None
        output = self._model.generate(**inputs, custom_generate=_recording(scores, streamer))
        sequences = output.cpu().numpy()
        prompt = inputs["decoder_input_ids"].shape[1]
        log_probs = scores.of(sequences, prompt, np.repeat(np.arange(len(rows)), best))
        weights = self._attention(inputs, output) if attention else None
        hypotheses = []
        for row, sequence in enumerate(sequences):
            length, has_end = _generated(sequence[prompt:], ends, settings.pad_token_id)
            tokens = sequence[1 : prompt + length].tolist()
            chosen = log_probs[row, : length + has_end].tolist()
            hypotheses.append(
                Hypothesis(
                    token_ids=tokens,
                    score=_normalised(chosen, length_penalty),
                    token_log_probs=chosen,
                    attention=None
                    if weights is None
                    else weights[row, : len(tokens), : int(batch.attention_mask[rows[row // best]].sum())],
                )
            )
        groups_of_best = (hypotheses[start : start + best] for start in range(0, len(hypotheses), best))
        # Samples come in any order.
        return [sorted(group, key=lambda one: -one.score) for group in groups_of_best]

    def _inputs(self, batch: Batch, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = list(rows)
        mask = batch.attention_mask[chosen]
        # Of the sentences that are decoded elsewhere, no padding stays.
        width = int(mask.sum(axis=1).max())
        settings = self._model.generation_config
        start = settings.decoder_start_token_id
        start = settings.bos_token_id if start is None else start
        prompts = [[start, *batch.prefixes[row]] for row in chosen]
        arrays = {
            "input_ids": batch.input_ids[chosen, :width],
            "attention_mask": mask[:, :width],
            "decoder_input_ids": np.asarray(prompts, dtype=np.int64),
        }
        return {name: torch.from_numpy(array).to(self._model.device) for name, array in arrays.items()}

    def _attention(self, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> np.ndarray:
        """Cross-attention `(B * num_return_sequences, T, S)` with which each token of `sequences` was written.

        One more pass over what was generated: its attention is the same, and the beams need not be traced back.
        """
        repeats = len(sequences) // len(inputs["input_ids"])
        with self._eager_attention():
            output = self._model(
                input_ids=inputs["input_ids"].repeat_interleave(repeats, dim=0),
                attention_mask=inputs["attention_mask"].repeat_interleave(repeats, dim=0),
                decoder_input_ids=sequences[:, :-1],
                output_attentions=True,
                use_cache=False,
            )
        layers = output.cross_attentions
        weights: torch.Tensor = layers[-2 if len(layers) > 1 else -1].float().mean(dim=1)
        return weights.cpu().numpy()

    @contextlib.contextmanager
    def _eager_attention(self) -> Iterator[None]:
        """The only implementation that returns its weights."""
        own = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._model.set_attn_implementation(own)

    @contextlib.contextmanager
    def _settings(self, settings: GenerationConfig) -> Iterator[None]:
        """The model's own settings are replaced meanwhile: those given to generate() are completed with them, so that
        it would warn of a `max_length` that `max_new_tokens` has taken the place of."""
        own = self._model.generation_config
        if (settings.num_beams or 1) == 1 and settings.length_penalty is not None:
            # Ours alone: generate() would warn that it does nothing.
            settings = copy.copy(settings)
            settings.length_penalty = None
        if is_accelerator(self._model.device) and settings.cache_implementation is None:
            settings = GenerationConfig.from_dict(settings.to_dict() | {"cache_implementation": "static"})
        self._model.generation_config = settings
        try:
            yield
        finally:
            self._model.generation_config = own


def is_accelerator(device: torch.device) -> bool:
    """Whether a device is a GPU or the like."""
    return device.type != "cpu"


class _ChosenScores(LogitsProcessor):
    """Keeps, of the scores of all steps, those of the tokens that were chosen, and changes nothing.

    `generate(output_scores=True)` keeps the scores of all tokens, `(R, V)` at each step, which are gigabytes for a
    large batch. What it would say of the chosen ones is the same (`compute_transition_scores`).
    """

    def __init__(self, rows_per_source: int, ends: Sequence[int], *, are_log_probs: bool) -> None:
        self._rows_per_source = rows_per_source
        self._ends = list(ends)
        self._are_log_probs = are_log_probs
        # At each step: what the rows had so far, the scores of an end there, and those of the tokens chosen last.
        self._inputs: list[torch.Tensor] = []
        self._end_scores: list[torch.Tensor] = []
        self._last_scores: list[torch.Tensor] = []
        self._all: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(R, t)` tokens so far and `(R, V)` scores of the next one, processed: log-probabilities of a beam search,
        else logits."""
        if self._all is not None:
            self._last_scores.append(self._all[self._parents(input_ids), input_ids[:, -1]])
        self._all = scores if self._are_log_probs else scores.log_softmax(dim=-1)
        self._inputs.append(input_ids)
        self._end_scores.append(self._all[:, self._ends])
        return scores

    def _parents(self, input_ids: torch.Tensor) -> torch.Tensor:
        """For each row the row of the former step that it continues; equal rows are as good as each other."""
        former, now = (ids.unflatten(0, (-1, self._rows_per_source)) for ids in (self._inputs[-1], input_ids))
        same = (now[:, :, None, :-1] == former[:, None]).all(dim=-1)
        first = torch.arange(0, len(input_ids), self._rows_per_source, device=input_ids.device)
        return (same.int().argmax(dim=-1) + first[:, None]).flatten()

    def of(self, sequences: np.ndarray, prompt: int, sources: np.ndarray) -> np.ndarray:
        """Log-probabilities `(H, T)` of what `sequences` `(H, prompt + T)` have behind their prompt, for the source
        `sources` `(H,)` of each; what is there for tokens behind an end means nothing."""
        assert self._all is not None
        inputs, ends, last = (
            [step.cpu().numpy() for step in steps] for steps in (self._inputs, self._end_scores, self._last_scores)
        )
        columns = []
        for step in range(sequences.shape[1] - prompt):
            rows = self._rows(inputs[step], sequences, sources)
            tokens = sequences[:, prompt + step]
            if step + 1 < len(inputs):
                scores = last[step][self._rows(inputs[step + 1], sequences, sources)]
            else:
                scores = self._all[torch.from_numpy(rows), torch.from_numpy(tokens)].cpu().numpy()
            for column, end in enumerate(self._ends):
                scores = np.where(tokens == end, ends[step][rows, column], scores)
            columns.append(scores)
        return np.stack(columns, axis=1).astype(np.float64)

    def _rows(self, inputs: np.ndarray, sequences: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Which row of a step, `(H,)`, has what each sequence begins with."""
        candidates = inputs.reshape(-1, self._rows_per_source, inputs.shape[1])[sources]
        same = (candidates == sequences[:, None, : inputs.shape[1]]).all(axis=-1)
        rows: np.ndarray = same.argmax(axis=1) + sources * self._rows_per_source
        return rows


def _recording(scores: _ChosenScores, streamer: BaseStreamer | None) -> Callable[..., Any]:
    """A decoding method for `generate()`: the one it would have taken, with `scores` behind all processors.

    `logits_processor=` would put it before temperature, top-k and top-p. A streamer has to come by this way, since
    `generate()` does not hand it to a method that is not its own.
    """
    streaming = {} if streamer is None else {"streamer": streamer}

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        method = getattr(type(model), GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
        processors = LogitsProcessorList([*logits_processor, scores])
        return method(
            model,
            input_ids,
            logits_processor=processors,
            generation_config=generation_config,
            **streaming,
            **options,
        )

    return decode


class _Streamer(BaseStreamer):
    """Tells of each token of each row until the row ends."""

    def __init__(self, on_token: OnToken, rows: Sequence[int], ends: Sequence[int]) -> None:
        self._on_token = on_token
        self._rows = rows
        self._ends = ends
        self._open = [True] * len(rows)

    def put(self, value: torch.Tensor) -> None:
        """Take the next token of each row, `(B,)`."""
        for index, token in enumerate(value.tolist()):
            self._open[index] = self._open[index] and token not in self._ends
            if self._open[index]:
                self._on_token(self._rows[index], token)

    def end(self) -> None:
        """Nothing is held back."""


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """The global random generators seeded, and at the end as they were; without a seed they go on as always."""
    if seed is None:
        yield
        return
    devices = [device] if is_accelerator(device) else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _end_ids(settings: GenerationConfig) -> list[int]:
    ends = settings.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def _generated(tokens: np.ndarray, ends: Sequence[int], pad: int | None) -> tuple[int, bool]:
    """How many tokens were generated before the end, and whether there is one."""
    found = np.flatnonzero(np.isin(tokens, ends))
    if len(found):
        return int(found[0]), True
    length = len(tokens)
    while length and tokens[length - 1] == pad:
        length -= 1
    return length, False


def _normalised(log_probs: Sequence[float], length_penalty: float | None) -> float:
    penalty = 1.0 if length_penalty is None else length_penalty
    return float(sum(log_probs) / max(len(log_probs), 1) ** penalty)
