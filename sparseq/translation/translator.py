"""`Translator`: texts in, translations out, with whatever runtime is fastest here."""

import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from sparseq.conversion.likelihood import position_limit
from sparseq.conversion.sources import local_folder
from sparseq.languages import Cue, Direction, language_ids, target_field
from sparseq.loading import check_model_files, load_tokenizer
from sparseq.metrics.systems import load_seq2seq_config
from sparseq.tokenization_sparseq import language_tags
from sparseq.translation.backend import Backend, Batch, Hypothesis
from sparseq.translation.batches import fill_batches, windows
from sparseq.translation.generate_backend import GenerateBackend
from sparseq.translation.results import (
    PieceHypothesis,
    TranslatedHypothesis,
    Translation,
    blank_translation,
    join_pieces,
)
from sparseq.translation.runtimes import Choice, Precision, Runtime, open_backend
from sparseq.translation.sentences import split_text
from sparseq.translation.settings import check_lengths, forced_prefix, merge_settings, seeded_apart, usable_settings

__all__ = ["TranslatedHypothesis", "Translation", "Translator"]

TooLong = Literal["split", "error", "truncate"]
"""What becomes of a text that the model cannot read as a whole."""

MOST_LOGITS = 2**26
"""Numbers that one step gives at most, rows times vocabulary; one sentence is decoded whatever it takes."""

OnBatch = Callable[[int, int], None]
"""Told after each batch how many of the texts are done with it, and how many source tokens it had."""


@dataclass(frozen=True)
class _Job:
    """What is asked of all texts of one call; `noun` is what messages call them."""

    direction: Direction
    settings: GenerationConfig
    prefix: list[int]
    batch_tokens: int
    too_long: TooLong
    attention: bool
    noun: str
    on_batch: OnBatch

    @property
    def best(self) -> int:
        """Hypotheses of each text."""
        return self.settings.num_return_sequences or 1

    @property
    def rows(self) -> int:
        """Rows of a sentence in a batch."""
        return max(self.settings.num_beams or 1, self.best)


@dataclass(frozen=True)
class _Piece:
    """What is decoded at a time: a text, or a part of one that was too long."""

    text: int
    input_ids: list[int]
    prefix: list[int]


class Translator:
    """Translates with a sequence-to-sequence model, dense or sparse.

    ```python
    translator = Translator.from_pretrained("outputs/tiny")
    translator.translate("A man walks.", num_beams=4).text
    ```

    Settings bear the names of `generate()` (`num_beams`, `max_new_tokens`, `length_penalty`, `do_sample`, ...), and
    what is not given is the model's own generation configuration. In float32 the translations are those of
    `model.generate()`. One object must not be used by two threads at once; each may have its own.

    Args:
        backend: Decodes; `from_pretrained` and `from_model` choose one.
        tokenizer: The model's.
        config: The model's configuration.
        generation_config: The model's generation settings. Without a maximum, which would be 20 tokens to generate(),
            it is 256 tokens, as in a Sparseq model.
        name: Of the model, for messages.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        *,
        name: str = "the model",
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.generation_config = usable_settings(generation_config, position_limit(config))
        self._backend = backend
        self._config = config
        self._positions = position_limit(config)
        self._source_limit = _source_limit(tokenizer, config)
        # Naming languages changes what the tokenizer marks texts with.
        self._own_codes = {
            field: code for field in ("src_lang", "tgt_lang") if (code := getattr(tokenizer, field, None)) is not None
        }
        self._codes = language_ids(tokenizer)
        self._tags = [] if self._codes else language_tags(tokenizer)
        self._special = _special_tokens(tokenizer)
        self._vocab_size: int = getattr(config, "vocab_size", None) or len(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        precision: Precision = "float32",
        runtime: Runtime = "auto",
        device: str | torch.device | None = None,
        threads: int | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
    ) -> "Translator":
        """A translator for a model in a folder or on the Hub; no code that came with it is run.

        Args:
            name: Folder or Hub id of a sequence-to-sequence model with its tokenizer.
            precision: "float32", or "int8" for weights in 8 bits: smaller, faster, and a little less exact.
            runtime: "onnx" for ONNX Runtime on the CPU, whose graphs are made of a Sparseq model on first use and kept
                in `.sparseq` beside it; "torch" for `generate()`; "auto" for the first where it can be had, and
                otherwise the second with a warning in the log.
            device: Where it is to run; None for an accelerator if there is one, else the CPU.
            threads: Threads of one operator; None leaves it to the runtime. To PyTorch they are those of the process.
            cache_dir: Where graphs are kept, in place of beside the model. Where the model's folder cannot be written
                it is the user's cache (`$XDG_CACHE_HOME/sparseq`).
            revision: Branch, tag or commit of a repository of the Hub.

        Raises:
            FileNotFoundError: There is no such folder.
            ModuleNotFoundError: `runtime="onnx"` without onnx and onnxruntime.
            OSError: The repository cannot be read, or graphs cannot be written.
            ValueError: There is no sequence-to-sequence model with a tokenizer and weights in safetensors, a file of
                it is damaged, or it cannot be run as asked.
        """
        choice = Choice(precision, runtime, device, threads, cache_dir)
        folder = local_folder(str(name), revision=revision, accept=load_seq2seq_config)
        config = load_seq2seq_config(folder)
        check_model_files(folder, may_be_int8=True)
        tokenizer = load_tokenizer(folder)
        backend, settings = open_backend(folder, config, choice)
        return cls(backend, tokenizer, config, settings, name=str(name))

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Translator":
        """A translator over a model that is loaded already, whatever its code: `generate()` decodes, on its device."""
        settings = model.generation_config
        assert settings is not None
        name = model.config.name_or_path or type(model).__name__
        return cls(GenerateBackend(model), tokenizer, model.config, settings, name=name)

    def __repr__(self) -> str:
        return f"Translator({self.name!r}, runtime={self._backend.name!r})"

    @overload
    def translate(self, texts: str, **options: Any) -> Translation: ...

    @overload
    def translate(self, texts: Iterable[str], **options: Any) -> list[Translation]: ...

    def translate(
        self,
        texts: str | Iterable[str],
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        target_prefix: str | None = None,
        batch_tokens: int = 4096,
        too_long: TooLong = "split",
        return_attention: bool = False,
        **settings: Any,
    ) -> Translation | list[Translation]:
        """Translate a text or several; of several, element i of the result belongs to element i.

        Args:
            texts: Plain text. One that is empty or blank has an empty translation, without the model.
            source_language, target_language: For models of several languages: those of the tokenizer's tags ("de" for
                `<2de>`) or codes ("de" or "deu_Latn"). Models that are told no language take no notice.
            target_prefix: What each translation is to begin with.
            batch_tokens: Source tokens of a batch, padding included, counted once for each beam. Sentences of like
                length are batched together.
            too_long: What becomes of a text that is longer than the model reads: "split" cuts it at ends of sentences,
                or else of clauses or words, and joins the translations; "truncate" drops the rest; "error" refuses it.
            return_attention: Return cross-attention.
            settings: Of generate(), and `seed` for sampling, with which each call gives the same translations.

        Raises:
            ValueError: An argument, or a text that is too long, is refused; before anything is decoded.
        """
        job = self._job(
            source_language=source_language,
            target_language=target_language,
            target_prefix=target_prefix,
            batch_tokens=batch_tokens,
            too_long=too_long,
            return_attention=return_attention,
            **settings,
        )
        if isinstance(texts, str):
            return self._translate(job, [texts])[0]
        return self._translate(job, list(_check_texts(texts)))

    def translate_lines(
        self, lines: Iterable[str], *, first: int = 1, on_batch: OnBatch | None = None, **options: Any
    ) -> Iterator[Translation]:
        """Translate a stream of texts, which may have no end, in order and with flat memory.

        Some thousand are read at a time, sorted by length, translated, and yielded in the order of the stream.

        Args:
            lines: Texts.
            first: Number of the first line, for messages.
            on_batch: Told after each batch how many texts are done with it, and how many source tokens it had.
            options: The other arguments of `translate`.

        Raises:
            ValueError: An argument is refused, at once; or a text is too long, when its turn comes.
        """
        job = self._job(on_batch=on_batch, noun="Line", **options)
        return self._translate_windows(job, _check_texts(lines), first)

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Yield the translation of one text bit by bit as it is made; joined, the bits are the translation.

        Decoding stops when the iterator is closed.

        Args:
            text: Plain text.
            options: The other arguments of `translate`. There is one beam, whatever the model's own settings say.

        Raises:
            ValueError: As `translate`, or more than the text of one hypothesis is asked for.
        """
        for setting, value in (("num_beams", 1), ("num_return_sequences", 1), ("return_attention", False)):
            if options.setdefault(setting, value) != value:
                raise ValueError(
                    f"`{setting}` is {options[setting]}, but only the text of one hypothesis can be streamed."
                )
        job = self._job(**options)
        return self._stream(job, self._pieces(job, [text], first=1))

    def _job(
        self,
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        target_prefix: str | None = None,
        batch_tokens: int = 4096,
        too_long: TooLong = "split",
        return_attention: bool = False,
        noun: str = "Text",
        on_batch: OnBatch | None = None,
        **settings: Any,
    ) -> _Job:
        """The arguments of a call, checked."""
        if too_long not in get_args(TooLong):
            known = ", ".join(f'"{kind}"' for kind in get_args(TooLong))
            raise ValueError(f"`too_long` must be one of {known}, but is {too_long!r}.")
        if batch_tokens < 1:
            raise ValueError(f"`batch_tokens` must be at least 1, but is {batch_tokens}.")
        direction = Direction(
            source_language, target_language, option="{side}_language", code_option="`{side}_language`"
        )
        told = self._cue(direction).generation
        merged = merge_settings(self.generation_config, {**told, **settings})
        if not isinstance(target_prefix, str | None):
            raise ValueError(f"`target_prefix` must be a string, but is {target_prefix!r}.")
        prefix: list[int] = []
        if target_prefix:
            # Special tokens in it are text, as in sources.
            options = {"split_special_tokens": True} if self._special.search(target_prefix) else {}
            encoded = self.tokenizer(text_target=target_prefix, add_special_tokens=False, verbose=False, **options)
            prefix = forced_prefix(merged, encoded["input_ids"])
        check_lengths(merged, prefix, self._positions)
        on_batch = on_batch or (lambda texts, tokens: None)
        return _Job(direction, merged, prefix, batch_tokens, too_long, return_attention, noun, on_batch)

    def _cue(self, direction: Direction) -> Cue:
        """Have the tokenizer mark texts with the languages; what else tells the model is returned.

        Raises:
            ValueError: The model must be told a language and is not, or does not know it.
        """
        if self._codes:
            own = getattr(self.generation_config, target_field(self.tokenizer))
            if direction.source is None and direction.target is None and own in self._codes.values():
                # Saved for one direction; an earlier call may have asked for another.
                for field, code in self._own_codes.items():
                    setattr(self.tokenizer, field, code)
                return Cue()
            return direction.set_up(self.tokenizer, self.name)
        if not self._tags:
            return Cue()
        if direction.target is None and len(self._tags) == 1:
            return Cue(f"{self._tags[0]} ")
        languages = ", ".join(tag.removeprefix("<2").removesuffix(">") for tag in self._tags)
        if direction.target is None:
            raise ValueError(
                f"{self.name} must be told the target language: give `target_language`, one of {languages}."
            )
        cue = direction.set_up(self.tokenizer, self.name)
        if not cue.prefix:
            raise ValueError(f"target_language {direction.target}: {self.name} has tags for {languages} only.")
        return cue

    def _translate_windows(self, job: _Job, lines: Iterable[str], first: int) -> Iterator[Translation]:
        for window in windows(lines):
            yield from self._translate(job, window, first=first)
            first += len(window)

    def _translate(self, job: _Job, texts: Sequence[str], *, first: int = 1) -> list[Translation]:
        """The translations of texts, the first of which has the number `first`."""
        pieces = self._pieces(job, texts, first=first)
        pending = Counter(piece.text for piece in pieces)
        if blank := len(texts) - len(pending):
            job.on_batch(blank, 0)
        decoded: dict[int, list[PieceHypothesis]] = {}
        lengths = [len(piece.input_ids) for piece in pieces]
        most = max(1, MOST_LOGITS // (self._vocab_size * job.rows))
        batches = fill_batches(lengths, job.batch_tokens, rows=job.rows, most=most)
        for number, indices in enumerate(batches, start=first):
            chosen = [pieces[index] for index in indices]
            decoded.update(zip(indices, self._decode(job, chosen, number), strict=True))
            pending.subtract(piece.text for piece in chosen)
            done = sum(pending[text] == 0 for text in {piece.text for piece in chosen})
            job.on_batch(done, sum(lengths[index] for index in indices))

        parts: list[list[tuple[list[str], list[PieceHypothesis]]]] = [[] for _ in texts]
        for index, piece in enumerate(pieces):
            parts[piece.text].append((self._tokens(piece.input_ids), decoded[index]))
        penalty = 1.0 if job.settings.length_penalty is None else job.settings.length_penalty
        return [join_pieces(of_text, penalty) if of_text else blank_translation(job.best) for of_text in parts]

    def _pieces(self, job: _Job, texts: Sequence[str], *, first: int) -> list[_Piece]:
        """What is to be decoded of `texts`, in order; nothing of blank ones."""
        for number, text in enumerate(texts, start=first):
            if not isinstance(text, str):
                raise ValueError(f"{job.noun} {number} must be a string, but is of type {type(text).__name__}.")
        present = [index for index, text in enumerate(texts) if text.strip()]
        if not present:
            return []
        # Set anew each time: another call may have told the tokenizer other languages meanwhile.
        mark = self._cue(job.direction).prefix
        encoded = self._encode([texts[index] for index in present], mark)
        pieces = []
        for index, input_ids in zip(present, encoded, strict=True):
            parts = [input_ids]
            if self._source_limit is not None and len(input_ids) > self._source_limit:
                which = f"{job.noun} {first + index}"
                parts = self._shorten(mark, texts[index], which, len(input_ids), job.too_long, self._source_limit)
            # What follows the prefix follows it in the first piece.
            pieces += [_Piece(index, ids, [] if place else job.prefix) for place, ids in enumerate(parts)]
        return pieces

    def _shorten(
        self, mark: str, text: str, which: str, length: int, too_long: TooLong, limit: int
    ) -> list[list[int]]:
        """Token ids of what takes the place of a text that has more than `limit` tokens."""
        if too_long == "error":
            raise ValueError(
                f"{which} has {length} tokens, but {self.name} reads {limit} at most: shorten it, or have it cut with "
                '`too_long="split"`, at ends of sentences, or with `too_long="truncate"`.'
            )
        if too_long == "truncate":
            return self._encode([text], mark, limit=limit)
        parts = self._encode(split_text(text, lambda part: len(self._encode([part], mark)[0]) <= limit), mark)
        if max(map(len, parts)) > limit:
            raise ValueError(f"{which} cannot be cut to {limit} tokens, as many as {self.name} reads.")
        return parts

    def _decode(self, job: _Job, pieces: Sequence[_Piece], number: int) -> list[list[PieceHypothesis]]:
        """The hypotheses of each piece of the batch `number`."""
        settings = seeded_apart(job.settings, number)
        found = self._backend.decode(self._batch(pieces), settings, attention=job.attention)
        return [
            [self._hypothesis(one, len(piece.input_ids)) for one in of]
            for piece, of in zip(pieces, found, strict=True)
        ]

    def _batch(self, pieces: Sequence[_Piece]) -> Batch:
        width = max(len(piece.input_ids) for piece in pieces)
        input_ids = np.full((len(pieces), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, piece in enumerate(pieces):
            input_ids[row, : len(piece.input_ids)] = piece.input_ids
            mask[row, : len(piece.input_ids)] = 1
        return Batch(input_ids, mask, [piece.prefix for piece in pieces])

    def _hypothesis(self, one: Hypothesis, source_length: int) -> PieceHypothesis:
        return PieceHypothesis(
            text=self._text(one.token_ids),
            tokens=self._tokens(one.token_ids),
            attention=None if one.attention is None else one.attention[:, :source_length],
            log_prob=sum(one.token_log_probs),
            length=len(one.token_log_probs),
        )

    def _encode(self, texts: Sequence[str], mark: str, *, limit: int | None = None) -> list[list[int]]:
        """Token ids of texts behind a mark, which is a language tag and a blank or nothing, cut to `limit`."""
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        ids: list[list[int]] = self.tokenizer([mark + text for text in texts], verbose=False, **cut)["input_ids"]
        for index, text in enumerate(texts):
            if self._special.search(text):
                ids[index] = self._encode_as_text(text, mark, limit)
        return ids

    def _encode_as_text(self, text: str, mark: str, limit: int | None) -> list[int]:
        """Token ids of a text in which special tokens are spelled: there they are text like any other."""
        # The mark would be taken for text, too.
        tag = [self.tokenizer.convert_tokens_to_ids(mark.strip())] if mark else []
        cut = {} if limit is None else {"truncation": True, "max_length": limit - len(tag)}
        encoded = self.tokenizer(text.lstrip() if tag else text, verbose=False, split_special_tokens=True, **cut)
        return [*tag, *encoded["input_ids"]]

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _tokens(self, token_ids: Sequence[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(list(token_ids)))

    def _stream(self, job: _Job, pieces: Sequence[_Piece]) -> Iterator[str]:
        done, printed = "", ""
        for number, piece in enumerate(pieces, start=1):
            tokens = list(piece.prefix)
            for token in self._stream_tokens(job, piece, number):
                tokens += [] if token is None else [token]
                text = f"{done} {self._text(tokens)}".strip()
                # A character may take several tokens: until the last has come, it reads as unknown.
                if text.startswith(printed) and (token is None or not text.endswith("\N{REPLACEMENT CHARACTER}")):
                    if len(text) > len(printed):
                        yield text[len(printed) :]
                    printed = text
            done = text

    def _stream_tokens(self, job: _Job, piece: _Piece, number: int) -> Iterator[int | None]:
        """The tokens behind the prefix as they are decided, and None at the end."""
        decided: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        is_closed = threading.Event()

        def on_token(row: int, token: int) -> None:
            if is_closed.is_set():
                raise InterruptedError("nobody reads the stream any more")
            decided.put(token)

        def decode() -> None:
            try:
                self._backend.decode(self._batch([piece]), seeded_apart(job.settings, number), on_token=on_token)
                decided.put(None)
            except BaseException as error:
                decided.put(error)

        # What is decoded is pushed, what is read is pulled: the two need a thread each.
        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        try:
            token: int | None = 0
            while token is not None:
                item = decided.get()
                if isinstance(item, BaseException):
                    raise item
                token = item
                yield token
        finally:
            is_closed.set()
            thread.join()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds special tokens in a text; language tags and codes are among them."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = sorted({*added, *tokenizer.all_special_tokens})
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _check_texts(texts: Any) -> Iterable[str]:
    """
    Raises:
        ValueError: They are no texts, whatever can be iterated over in them.
    """
    # A data set may have items by number only, and be iterated over all the same.
    is_iterable = isinstance(texts, Iterable) or hasattr(texts, "__getitem__")
    if isinstance(texts, str | bytes | bytearray | Mapping) or not is_iterable:
        raise ValueError(f"Texts must be strings in a list or the like, but are of type {type(texts).__name__}.")
    checked: Iterable[str] = texts
    return checked


def _source_limit(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """Tokens that a text may have: what the tokenizer says or the model was made for, whichever is less."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < LARGE_INTEGER else []
    positions = getattr(config, "max_position_embeddings", None)
    return min([*limits, *([] if positions is None else [positions])], default=None)
