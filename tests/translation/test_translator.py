"""`Translator`: equal to generate(), in order, with languages, prefixes, streams, long texts and flat memory."""

import itertools
import logging
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as library_logging

import sparseq
from sparseq.translation.translator import Translator
from tests.conversion.checkpoints import write_checkpoint
from tests.conversion.tokenizer_folders import SENTENCES
from tests.tiny import tiny_config
from tests.translation.models import SOURCES, EchoBackend, tiny_tokenizer, write_model

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def translator(folder: Path) -> Translator:
    return sparseq.Translator.from_pretrained(folder, runtime="torch", device="cpu")


def echo(languages: tuple[str, ...] = (), **config: Any) -> tuple[Translator, EchoBackend]:
    backend = EchoBackend()
    settings = GenerationConfig(max_length=50, decoder_start_token_id=1, eos_token_id=2)
    return Translator(backend, tiny_tokenizer(languages), tiny_config(**config), settings, name="echo"), backend


def generated(folder: Path, text: str, **options: Any) -> list[str]:
    """What generate() makes of one text."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer([f"<2de> {text}"], return_tensors="pt"), **options)
    return [one.strip() for one in tokenizer.batch_decode(output, skip_special_tokens=True)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"max_new_tokens": 5}])
def test_translations_are_those_of_generate(
    translator: Translator, folder: Path, batch_tokens: int, options: dict[str, Any]
) -> None:
    found = translator.translate(iter(SOURCES), batch_tokens=batch_tokens, **options)
    assert len(found) == len(SOURCES)
    for source, translation in zip(SOURCES, found, strict=True):
        assert translation.text == translation.hypotheses[0].text
        assert translation.score == translation.hypotheses[0].score
        expected = generated(folder, source, **options) if source.strip() else [""] * len(translation.hypotheses)
        assert [one.text for one in translation.hypotheses] == expected
        assert len(expected) == options.get("num_return_sequences", 1)
    assert len({translation.text for translation in found}) > 3, "a test of equal texts would show nothing"
    assert found[2].score == 0
    assert found[2].source_tokens == []


def test_one_text_gives_one_translation(translator: Translator) -> None:
    one = translator.translate(SOURCES[0], return_attention=True)
    assert one.text == translator.translate([SOURCES[0]])[0].text
    assert one.source_tokens[0] == "<2de>"
    assert one.source_tokens[-1] == "</s>"
    attention = one.hypotheses[0].attention
    assert attention is not None
    assert attention.shape == (len(one.hypotheses[0].tokens), len(one.source_tokens))
    np.testing.assert_allclose(attention.sum(axis=1), 1, rtol=1e-5)


def test_batches_count_padding_and_beams_and_hold_like_lengths() -> None:
    translator, backend = echo()
    texts = [" ".join(["ball"] * (1 + number % 7)) for number in range(40)]
    assert [one.text for one in translator.translate(texts, batch_tokens=150, num_beams=3)] == texts
    sizes = [batch.input_ids.size * 3 for batch in backend.batches]
    assert max(sizes) <= 150
    assert len(sizes) > 3
    assert all(settings.num_beams == 3 for settings in backend.settings)
    widths = [batch.input_ids.shape[1] for batch in backend.batches]
    assert widths == sorted(widths, reverse=True)


def test_lines_are_read_in_windows_and_come_in_order() -> None:
    translator, _ = echo()
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):
            yield "" if read % 5 == 0 else " ".join(["ball"] * (read % 4)) + f" {read}"

    translations = translator.translate_lines(endless())
    for number in range(1, 5001):
        text = next(translations).text
        assert text == ("" if number % 5 == 0 else (" ".join(["ball"] * (number % 4)) + f" {number}").strip())
        assert read < number + 4096
    translations.close()  # type: ignore[attr-defined]  # it is a generator


def test_memory_does_not_grow_with_the_lines() -> None:
    translator, backend = echo()
    backend.keep = False
    lines = (f"A dog {number}." for number in range(40_000))
    translations = translator.translate_lines(lines)
    next(translations)
    tracemalloc.start()
    try:
        peaks = []
        for part in range(4):
            tracemalloc.reset_peak()
            for number, translation in enumerate(itertools.islice(translations, 9_000), start=1 + 9_000 * part):
                assert translation.text == f"A dog {number}."
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert max(peaks[1:]) < 1.3 * peaks[0]


def test_progress_counts_every_text_once_when_it_is_done() -> None:
    translator, _ = echo(max_position_embeddings=12)
    told: list[tuple[int, int]] = []
    texts = ["", "A dog.", "A red ball. Two red balls. A dog plays in the garden.", " ", "The river"] * 3
    list(translator.translate_lines(texts, batch_tokens=1, on_batch=lambda done, tokens: told.append((done, tokens))))
    assert sum(done for done, _ in told) == len(texts)
    assert told[0] == (6, 0)
    assert any(done == 0 for done, _ in told), "a piece of a longer text ends no text"


def test_texts_that_are_none_are_refused(translator: Translator) -> None:
    with pytest.raises(ValueError, match="Text 2 must be a string, but is of type int"):
        translator.translate(["a", 3])  # type: ignore[list-item]


LONG = "A red ball. Two red balls lie in the garden. A dog plays there, and a man reads."


def test_long_texts_are_split_at_sentences_and_joined() -> None:
    translator, backend = echo(max_position_embeddings=24)
    one = translator.translate(LONG, num_return_sequences=2, num_beams=2, length_penalty=0.5, return_attention=True)
    assert one.text == LONG
    pieces = [int(mask.sum()) for batch in backend.batches for mask in batch.attention_mask]
    assert len(pieces) > 1
    assert max(pieces) <= 24
    # One score for each token and each piece's end, as if it were one sentence.
    assert one.score == pytest.approx(-(sum(pieces) ** 0.5))
    first = one.hypotheses[0]
    assert len(one.hypotheses) == 2
    assert len(one.source_tokens) == sum(pieces)
    assert first.attention is not None
    assert first.attention.shape == (len(first.tokens), len(one.source_tokens))
    np.testing.assert_allclose(first.attention.sum(axis=1), 1)
    assert first.attention[0, -1] == 0, "the first piece has not looked at the last"


def test_long_texts_are_truncated_or_refused_as_asked() -> None:
    translator, backend = echo(max_position_embeddings=24)
    cut = translator.translate(["A dog.", LONG], too_long="truncate")
    assert LONG.startswith(cut[1].text)
    assert max(batch.input_ids.shape[1] for batch in backend.batches) == 24
    backend.batches.clear()
    with pytest.raises(ValueError, match=r"Text 2 has \d+ tokens, but echo reads 24 at most: .* `too_long=\"split\"`"):
        translator.translate(["A dog.", LONG], too_long="error")
    assert not backend.batches, "nothing is decoded before a text is refused"
    lines = translator.translate_lines(["A dog."] * 3000 + [LONG], too_long="error")
    with pytest.raises(ValueError, match=r"Line 3001 has \d+ tokens"):
        list(lines)
    with pytest.raises(ValueError, match=r"`too_long` must be one of .*, but is 'cut'"):
        translator.translate("a", too_long="cut")  # type: ignore[call-overload]


def test_learned_positions_are_split_before_the_model_refuses_them(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "learned", position_embedding_type="learned", max_position_embeddings=20)
    translator = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    assert translator.translate(LONG).source_tokens.count("</s>") > 1
    with pytest.raises(ValueError, match=r"`max_new_tokens` is 21, but the model has 20 target positions.*20 or less"):
        translator.translate("A dog.", max_new_tokens=21)
    (one,) = translator.translate("A dog.", max_new_tokens=20, min_new_tokens=20).hypotheses
    assert len(one.tokens) == 20
    settings = GenerationConfig.from_pretrained(folder)
    settings.max_length = 90
    settings.save_pretrained(folder)
    translator = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    (one,) = translator.translate("A dog.", min_new_tokens=20).hypotheses
    assert len(one.tokens) == 20


def test_a_prefix_begins_every_translation(translator: Translator, folder: Path) -> None:
    found = translator.translate(SOURCES, target_prefix="Ein Mann", num_beams=2, num_return_sequences=2)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prefix = tokenizer("Ein Mann", add_special_tokens=False)["input_ids"]
    for source, translation in zip(SOURCES, found, strict=True):
        if not source.strip():
            assert translation.text == ""
            continue
        output = model.generate(
            **tokenizer([f"<2de> {source}"], return_tensors="pt"),
            decoder_input_ids=torch.tensor([[1, *prefix]]),
            num_beams=2,
            num_return_sequences=2,
        )
        expected = [one.strip() for one in tokenizer.batch_decode(output, skip_special_tokens=True)]
        assert [one.text for one in translation.hypotheses] == expected
        assert all(one.startswith("Ein Mann") for one in expected)
    with pytest.raises(ValueError, match=r"`target_prefix` has \d+ tokens, but a translation has 14 at most"):
        translator.translate("A dog.", target_prefix=SENTENCES[4])


def test_a_prefix_of_a_long_text_begins_its_first_piece_only() -> None:
    translator, _ = echo(max_position_embeddings=24)
    assert translator.translate(LONG, target_prefix="Ein").text == f"Ein {LONG}"


def test_seeds(translator: Translator) -> None:
    options: dict[str, Any] = {"do_sample": True, "batch_tokens": 40}
    state = torch.get_rng_state()
    first = [one.text for one in translator.translate(SOURCES, seed=1, **options)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.text for one in translator.translate(SOURCES, seed=1, **options)] == first
    assert [one.text for one in translator.translate(SOURCES, seed=2, **options)] != first
    same = translator.translate(["A dog."] * 8, seed=1, do_sample=True, batch_tokens=1)
    assert len({one.text for one in same}) > 1, "batches must not all draw the same"


@pytest.mark.parametrize("text", [SOURCES[0], "Größe ändern, Äpfel essen!"])
def test_a_stream_gives_the_translation_bit_by_bit(translator: Translator, text: str) -> None:
    bits = list(translator.stream(text))
    assert len(bits) > 2
    assert "".join(bits) == translator.translate(text, num_beams=1).text
    assert list(translator.stream("")) == []


def test_a_stream_shows_no_broken_characters_and_joins_pieces() -> None:
    translator, _ = echo(max_position_embeddings=24)
    text = "雨 fällt. Zwei Kinder — spielen im Garten. Das alte Haus ist heute leer."
    bits = list(translator.stream(text, target_prefix="日本"))
    assert not any("\N{REPLACEMENT CHARACTER}" in bit for bit in bits)
    assert "".join(bits) == translator.translate(text, target_prefix="日本").text == f"日本 {text}"


def test_a_stream_that_is_closed_stops_decoding() -> None:
    translator, backend = echo()
    stream = translator.stream(SENTENCES[0])
    assert next(stream)
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(backend.batches) == 1
    with pytest.raises(ValueError, match="`num_beams` is 4, but only the text of one hypothesis can be streamed"):
        translator.stream("a", num_beams=4)


def test_errors_of_decoding_reach_the_reader_of_a_stream() -> None:
    translator, backend = echo()

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    backend.decode = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        list(translator.stream("A dog."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 4}, "`beams` is no setting of translation. Did you mean num_beams?"),
        ({"target_lang": "de"}, "`target_lang` is no setting of translation. Did you mean target_language?"),
        ({"output_scores": True}, "`output_scores` is no setting"),
        ({"num_beams": 0}, "`num_beams` must be a whole number from 1 on, but is 0."),
        ({"num_beams": 2, "num_return_sequences": 3}, "`num_return_sequences` (3) has to be smaller or equal"),
        ({"max_length": 5, "max_new_tokens": 5}, "`max_length` and `max_new_tokens` say the same in two ways"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number from 1 on"),
        ({"max_length": 1}, "`max_length` is 1, but it counts the start token: give 2 or more, or `max_new_tokens`."),
        ({"seed": "x"}, "`seed` must be a whole number from 0 to 9223372036854775807, but is 'x'."),
        ({"seed": -1}, "`seed` must be a whole number from 0 to 9223372036854775807, but is -1."),
        ({"seed": 2**63}, "`seed` must be a whole number from 0 to 9223372036854775807, but is 9223372036854775808."),
        ({"length_penalty": float("nan")}, "`length_penalty` must be a number, but is nan."),
        ({"length_penalty": float("inf"), "num_beams": 2}, "`length_penalty` must be a number, but is inf."),
        ({"do_sample": True, "min_p": float("nan")}, "`min_p` must be a number, but is nan."),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` (=0.0) has to be a strictly positive float"),
        ({"do_sample": True, "top_k": -3}, "`top_k` has to be a strictly positive integer, but is -3"),
        ({"do_sample": True, "top_p": 1.5}, "`top_p` must be at most 1, but is 1.5."),
        ({"repetition_penalty": 0.0}, "`penalty` has to be a strictly positive float, but is 0.0"),
        ({"stop_strings": ["."]}, "`stop_strings` is followed by no runtime of the translator: cut the translations"),
        ({"target_prefix": 5}, "`target_prefix` must be a string, but is 5."),
        ({"batch_tokens": 0}, "`batch_tokens` must be at least 1, but is 0."),
    ],
)
def test_settings_are_checked_before_anything_is_decoded(settings: dict[str, Any], message: str) -> None:
    translator, backend = echo()
    for call in (translator.translate, translator.translate_lines):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(["A dog."], **settings)
    assert not backend.batches


@pytest.mark.parametrize("texts", [{"a": "A dog."}, b"A dog.", bytearray(b"A dog."), 5, None])
def test_what_is_no_list_of_texts_is_refused(texts: Any) -> None:
    translator, backend = echo()
    for call in (translator.translate, translator.translate_lines):
        with pytest.raises(ValueError, match=f"must be strings in a list or the like, but .* {type(texts).__name__}"):
            call(texts)
    with pytest.raises(ValueError, match="must be strings in a list or the like, but are of type str"):
        translator.translate_lines("A dog.")
    assert not backend.batches


def test_stop_strings_of_a_model_are_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings = GenerationConfig(max_length=50, decoder_start_token_id=1, eos_token_id=2, stop_strings=["dog"])
    backend = EchoBackend()
    translator = Translator(backend, tiny_tokenizer(()), tiny_config(), settings)
    assert "The model's own `stop_strings` = ['dog'] are passed over" in caplog.text
    assert translator.translate("A dog.").text == "A dog."
    assert backend.settings[0].stop_strings is None


def test_a_batch_has_only_so_many_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    translator, backend = echo()
    size = tiny_config().vocab_size
    monkeypatch.setattr("sparseq.translation.translator.MOST_LOGITS", 6 * size)
    texts = ["A dog."] * 10
    assert [one.text for one in translator.translate(texts, num_beams=2)] == texts
    assert [len(batch.input_ids) for batch in backend.batches] == [3, 3, 3, 1]
    backend.batches.clear()
    assert len(translator.translate(texts, num_beams=9)) == 10
    assert [len(batch.input_ids) for batch in backend.batches] == [1] * 10


SPELLED = ["A </s> dog", "<2fr> A dog", "<pad>", "the end</s>", "<s> <2de> A dog.", " <unk>"]


@pytest.mark.parametrize("languages", [(), ("de", "fr")])
def test_special_tokens_that_are_spelled_in_a_text_are_text(languages: tuple[str, ...]) -> None:
    translator, backend = echo(languages)
    options = {"target_language": "de"} if languages else {}
    special = {0, 1, 2, 3, *translator.tokenizer.convert_tokens_to_ids([f"<2{code}>" for code in languages])}
    for text in SPELLED:
        one = translator.translate(text, **options)  # type: ignore[arg-type]
        assert one.source_tokens[-1] == "</s>"
        assert one.source_tokens[0] == "<2de>" or not languages
        assert not special & set(sources_of(backend)[len(languages[:1]) : -1])
        within = translator.translate("A dog.", target_prefix=text, **options)  # type: ignore[arg-type]
        assert not special & set(backend.batches[-1].prefixes[0])
        assert within.text.startswith(text.strip())
    # What comes next is encoded as ever, and the text of both ways is the same but for special tokens.
    for text in SENTENCES:
        one = translator.translate(text, **options)  # type: ignore[arg-type]
        mark = "<2de> " if languages else ""
        assert sources_of(backend) == translator.tokenizer(mark + text)["input_ids"]
        assert sources_of(backend) == translator._encode_as_text(text, mark, None)
    cut, backend = echo(languages, max_position_embeddings=8)
    cut.translate("A </s> dog " * 9, too_long="truncate", **options)  # type: ignore[arg-type]
    assert len(sources_of(backend)) == 8
    cut.translate("A </s> dog " * 9, **options)  # type: ignore[arg-type]
    assert max(batch.input_ids.shape[1] for batch in backend.batches) == 8


@pytest.mark.parametrize("family", ["marian", "bart", "m2m100", "nllb"])
def test_special_tokens_in_texts_for_other_tokenizers(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(family, tmp_path / family)
    translator = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    languages = {"m2m100": ("en", "de"), "nllb": ("eng_Latn", "deu_Latn")}.get(family)
    options = dict(zip(("source_language", "target_language"), languages, strict=True)) if languages else {}
    plain = translator.translate("A dog runs.", **options).source_tokens  # type: ignore[arg-type]
    found = translator.translate("A </s> dog <pad> runs.", **options).source_tokens  # type: ignore[arg-type]
    assert "<pad>" not in found
    assert found.count("</s>") == plain.count("</s>") == 1
    assert found[-1] == plain[-1]


def test_the_models_own_settings_hold_unless_changed() -> None:
    translator, backend = echo()
    translator.generation_config.update(num_beams=4, length_penalty=0.7)
    translator.translate("A dog.", max_new_tokens=7)
    assert backend.settings[-1].num_beams == 4
    assert (backend.settings[-1].max_length, backend.settings[-1].max_new_tokens) == (None, 7)
    translator.translate("A dog.")
    assert (backend.settings[-1].max_length, backend.settings[-1].length_penalty) == (50, 0.7)
    translator.translate("A dog.", num_beams=None, length_penalty=None, min_p=None)
    assert (backend.settings[-1].num_beams, backend.settings[-1].length_penalty) == (None, None)


def test_settings_of_another_search_are_passed_over_without_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for runtime in ("onnx", "torch"):
        translator = Translator.from_pretrained(folder, runtime=runtime, device="cpu")  # type: ignore[arg-type]
        translator.generation_config.update(num_beams=4, early_stopping=True, length_penalty=0.5)
        # The library says a thing once.
        library_logging.warning_once.cache_clear()
        caplog.clear()
        one = translator.translate("A dog.", num_beams=1)
        assert translator.translate("A dog.", num_beams=1, length_penalty=0.5).score == one.score
        words = ("early_stopping", "length_penalty")
        assert not [one for one in caplog.records if any(word in one.getMessage() for word in words)]
        assert one.score < translator.translate("A dog.", num_beams=1, length_penalty=1.0).score


def sources_of(backend: EchoBackend) -> list[int]:
    return backend.batches[-1].input_ids[0].tolist()


def test_tags_are_put_before_sources() -> None:
    one, backend = echo(("de",))
    assert one.translate("A dog.").source_tokens[0] == "<2de>"
    assert sources_of(backend)[0] == one.tokenizer.convert_tokens_to_ids("<2de>")
    with pytest.raises(ValueError, match="target_language fr: echo has tags for de only"):
        one.translate("A dog.", target_language="fr")
    many, _ = echo(("de", "fr"))
    assert many.translate("A dog.", source_language="en", target_language="fr").source_tokens[0] == "<2fr>"
    assert many.translate("A dog.", target_language="<2de>").source_tokens[0] == "<2de>"
    with pytest.raises(ValueError, match="must be told the target language: give `target_language`, one of de, fr"):
        many.translate("A dog.")


@pytest.mark.parametrize(
    ("family", "source", "target"),
    [("nllb", "eng_Latn", "deu_Latn"), ("mbart", "en", "de"), ("mbart50", "en_XX", "de_DE"), ("m2m100", "en", "de")],
)
def test_language_codes_reach_tokenizer_and_decoder(tmp_path: Path, family: str, source: str, target: str) -> None:
    folder = write_checkpoint(family, tmp_path / family)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.generation_config.update(max_length=12, forced_bos_token_id=None)
    model.save_pretrained(folder)
    translator = Translator.from_pretrained(folder, runtime="torch", device="cpu")
    found = translator.translate(SENTENCES[:3], source_language=source, target_language=target)
    codes = {"mbart": ("en_XX", "de_DE")}.get(family, (source, target))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, src_lang=codes[0], tgt_lang=codes[1])
    code = tokenizer.convert_tokens_to_ids(codes[1]) if family != "m2m100" else tokenizer.get_lang_id(codes[1])
    field = "decoder_start_token_id" if family == "mbart" else "forced_bos_token_id"
    output = model.generate(**tokenizer(SENTENCES[:3], padding=True, return_tensors="pt"), **{field: code})
    expected = tokenizer.batch_decode(output, skip_special_tokens=True)
    assert [one.text for one in found] == [one.strip() for one in expected]
    begun = translator.translate(
        SENTENCES[0], source_language=source, target_language=target, target_prefix=SENTENCES[4][:8]
    )
    assert SENTENCES[4][:8].strip() in begun.text
    assert begun.hypotheses[0].tokens.count(codes[1]) <= 1
    with pytest.raises(ValueError, match=r"target_language xx: the tokenizer of .* codes, but not this one"):
        translator.translate("A dog.", source_language=source, target_language="xx")
    with pytest.raises(ValueError, match="must be told the source language: give `source_language`, one of"):
        translator.translate("A dog.", target_language=target)


def test_a_model_in_memory(folder: Path, translator: Translator) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    other = Translator.from_model(model, AutoTokenizer.from_pretrained(folder))
    assert other.translate(SOURCES[0]).text == translator.translate(SOURCES[0]).text
    assert str(folder) in repr(other)


def test_what_cannot_be_run_is_refused(tmp_path: Path, folder: Path) -> None:
    for options, message in (
        ({"precision": "int4"}, '`precision` must be one of "float32", "int8", but is \'int4\''),
        ({"runtime": "tensorrt"}, '`runtime` must be one of "auto", "onnx", "torch"'),
        ({"threads": 0}, "`threads` must be a whole number from 1 on, but is 0"),
        ({"threads": "2"}, "`threads` must be a whole number from 1 on, but is '2'"),
        ({"device": "foo"}, "`device` is 'foo', which PyTorch does not find on this machine: it has cpu"),
        ({"device": "cpu:7"}, "`device` is 'cpu:7', which PyTorch does not find on this machine: it has cpu"),
        ({"runtime": "onnx", "device": "cuda"}, '`runtime="onnx"` runs on the CPU, but `device` is cuda'),
        ({"revision": "main"}, "is for repositories of the Hub"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Translator.from_pretrained(folder, **options)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="so it holds no model"):
        Translator.from_pretrained(tmp_path)
    sparseq.SparseqEncoderModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        Translator.from_pretrained(tmp_path / "encoder", runtime="torch")


def test_the_programs_of_the_document_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = Path(__file__).parents[2] / "docs" / "translation.md"
    programs = re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), flags=re.DOTALL)
    assert len(programs) == 2
    monkeypatch.chdir(tmp_path)
    write_model(Path("outputs/tiny"))
    Path("new.en").write_text("A dog.\nA man reads.\n")
    capsys.readouterr()
    for program in programs:
        exec(program, {})
    assert len(capsys.readouterr().out.splitlines()) == 7
