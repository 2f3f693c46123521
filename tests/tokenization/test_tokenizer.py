"""Encoding, decoding, saving and loading, with the class and as what transformers makes of it without the package."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from sparseq import SparseqConfig, SparseqForConditionalGeneration, SparseqTokenizer
from sparseq.tokenization_sparseq import language_tag

NASTY = [
    "",
    " ",
    "   ",
    " leading",
    "trailing ",
    "  two  blanks  inside  ",
    "\t",
    "tab\tinside \t and \t around",
    "\n",
    "one\nline\r\nanother\r",
    "\u2028\u2029\x85\u00a0\u3000",
    "\u2581",
    " \u2581The old\u2581man \u2581",
    "\0",
    "a\0b\0",
    "e\u0301a\u0308 \u0301",
    "\u0301starts with a combining mark",
    "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}\u200d\N{BOY} \N{WAVING HAND SIGN}\U0001f3fd",
    "שלום עולם \u202b\u0645\u0631\u062d\u0628\u0627\u202c",
    "<0x41>",
    "x<0x41> <0xC3><0xA9> <0xFF>",
    "".join(map(chr, range(256))),
    "\U0001d4b3\U00010348\U0010ffff\U00020000",
    "\ufeff\ufffd\ufffe\uffff",
    "日本語のテキスト",
    "< s> <2 de> <|x|> </ s>",
    "ﬁ Å İ ß ẞ",
]

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
# Short alphabets meet each other far more often: blanks, marks, joiners, parts of byte and special tokens.
CROWDED = st.text(st.sampled_from(" \t\n\u2581\u0301\u200d<>02x41ABade'.\u00e4\U0001f600\0"), max_size=30)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<2de>", "<2fr>")


@pytest.fixture(scope="module")
def folder(tokenizer: SparseqTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["trained", "reloaded", "without the class"])
def loaded(request: pytest.FixtureRequest, tokenizer: SparseqTokenizer, folder: Path) -> PreTrainedTokenizerFast:
    if request.param == "trained":
        return tokenizer
    if request.param == "reloaded":
        return SparseqTokenizer.from_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def holds_no_special_token(text: str) -> bool:
    return not any(token in text for token in SPECIAL)


def assert_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_text_comes_back(loaded: PreTrainedTokenizerFast, text: str) -> None:
    assert_comes_back(loaded, text)


def test_every_byte_token_stands_for_its_byte(tokenizer: SparseqTokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    first = vocabulary["<0x00>"]
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(first, first + 256))
    assert first == len(SPECIAL)
    unseen = "\U0001f600"
    ids = tokenizer.encode(unseen, add_special_tokens=False)
    assert ids == [vocabulary[" "], *(first + byte for byte in unseen.encode())]


@pytest.mark.parametrize("loaded", ["trained", "without the class"], indirect=True)
def test_all_of_unicode_comes_back(loaded: PreTrainedTokenizerFast) -> None:
    @given((UNICODE | CROWDED).filter(holds_no_special_token))
    @example("a <0x41> b")
    def check(text: str) -> None:
        assert_comes_back(loaded, text)

    check()


# At least one text: transformers takes an empty batch for one text without tokens.
@given(texts=st.lists(CROWDED.filter(holds_no_special_token), min_size=1, max_size=5))
def test_batches_decode_as_single_texts_do(tokenizer: SparseqTokenizer, texts: list[str]) -> None:
    ids = [tokenizer.encode(text) for text in texts]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    pieces = [[str(tokenizer.convert_ids_to_tokens(number)) for number in row[:-1]] for row in ids]
    joined = [tokenizer.convert_tokens_to_string(row) for row in pieces]
    assert joined == texts


def test_seen_text_comes_back_under_every_algorithm(any_tokenizer: SparseqTokenizer, corpus: list[str]) -> None:
    for text in corpus:
        assert_comes_back(any_tokenizer, text)
        assert any_tokenizer.unk_token_id not in any_tokenizer.encode(text)


def test_algorithms_without_bytes_know_an_unknown(any_tokenizer: SparseqTokenizer) -> None:
    ids = any_tokenizer.encode("日", add_special_tokens=False)
    assert (any_tokenizer.unk_token_id in ids) == ("<0x00>" not in any_tokenizer.get_vocab())


def test_first_word_has_the_tokens_it_has_inside(any_tokenizer: SparseqTokenizer) -> None:
    first = any_tokenizer.encode("garden", add_special_tokens=False)
    both = any_tokenizer.encode("garden garden", add_special_tokens=False)
    assert both == first + first


def test_special_tokens_and_template(any_tokenizer: SparseqTokenizer) -> None:
    assert any_tokenizer.convert_ids_to_tokens(list(range(5))) == ["<pad>", "<s>", "</s>", "<unk>", "<2de>"]
    named = [any_tokenizer.pad_token_id, any_tokenizer.bos_token_id, any_tokenizer.eos_token_id]
    assert [*named, any_tokenizer.unk_token_id] == [0, 1, 2, 3]
    man = any_tokenizer.encode("A man", add_special_tokens=False)
    dog = any_tokenizer.encode("Two dogs", add_special_tokens=False)
    assert any_tokenizer.encode("A man") == [*man, 2]
    assert any_tokenizer.encode("A man", "Two dogs") == [*man, *dog, 2]
    assert any_tokenizer.encode("") == [2]
    assert sorted(any_tokenizer("A man")) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("blank", ["", " ", "  ", "\n"], ids=ascii)
def test_a_tag_leaves_the_ids_after_it_alone(loaded: PreTrainedTokenizerFast, blank: str) -> None:
    tag = loaded.convert_tokens_to_ids("<2de>")
    assert loaded.encode(f"<2de>{blank}The old man") == [tag, *loaded.encode("The old man")]


def test_target_text_has_the_template_and_no_tag(loaded: PreTrainedTokenizerFast) -> None:
    batch = loaded("<2de> The old man", text_target="Der alte Mann")
    assert batch["labels"] == loaded.encode("Der alte Mann")
    assert batch["input_ids"] == loaded.encode("<2de> The old man")
    assert batch["labels"][-1] == loaded.eos_token_id
    assert loaded.convert_tokens_to_ids("<2de>") not in batch["labels"]


def test_tags_are_skipped_in_decoding(loaded: PreTrainedTokenizerFast) -> None:
    ids = [loaded.bos_token_id, *loaded.encode("<2fr> The old man"), loaded.pad_token_id]
    assert loaded.decode(ids, skip_special_tokens=True) == "The old man"
    assert {"<2de>", "<2fr>"} < set(loaded.all_special_tokens)


def test_saving_changes_nothing(tokenizer: SparseqTokenizer, folder: Path, tmp_path: Path) -> None:
    again = SparseqTokenizer.from_pretrained(folder)
    again.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "SparseqTokenizer"
    assert "auto_map" not in config
    assert type(AutoTokenizer.from_pretrained(folder)) is SparseqTokenizer
    assert again.model_max_length == tokenizer.model_max_length == 1024


def test_loads_without_the_package(tokenizer: SparseqTokenizer, tmp_path: Path, corpus: list[str]) -> None:
    """Where `sparseq` cannot be imported and no remote code is trusted, ids and texts are the same.

    Alone in its folder, and beside the configuration of a model that was saved with its code.
    """
    texts = [*NASTY, *corpus[:3], "<2de> The old man", "<2fr>The old man"]
    (tmp_path / "texts.json").write_text(json.dumps(texts), "utf-8")
    config = SparseqConfig(vocab_size=len(tokenizer))
    config.auto_map = {"AutoConfig": "configuration_sparseq.SparseqConfig"}
    config.save_pretrained(tmp_path / "model")
    for folder in ("alone", "model"):
        tokenizer.save_pretrained(tmp_path / folder)
    code = (
        "import json, sys\n"
        "sys.modules['sparseq'] = None\n"
        "from transformers import AutoTokenizer\n"
        "texts = json.load(open('texts.json', encoding='utf-8'))\n"
        "results = []\n"
        "for folder in ('alone', 'model'):\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "    batch = tokenizer(texts, text_target=texts)\n"
        "    decoded = tokenizer.batch_decode(batch['input_ids'], skip_special_tokens=True)\n"
        "    results.append([type(tokenizer).__name__, dict(batch), decoded])\n"
        "json.dump(results, open('results.json', 'w', encoding='utf-8'))\n"
    )
    # Without standard input transformers cannot ask whether to trust the configuration's code, and does without it.
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, stdin=subprocess.DEVNULL, check=True)
    expected = dict(tokenizer(texts, text_target=texts))
    for kind, batch, decoded in json.loads((tmp_path / "results.json").read_text("utf-8")):
        assert kind == "TokenizersBackend"
        assert batch == expected
        assert decoded == [*NASTY, *corpus[:3], "The old man", "The old man"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(tokenizer: SparseqTokenizer, folder: Path, side: str) -> None:
    padder = SparseqTokenizer.from_pretrained(folder, padding_side=side)
    texts = ["A man", "The old man walks slowly in the garden."]
    batch = padder(texts, padding=True, return_tensors="pt")
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        expected = tokenizer.encode(text)
        assert ids[mask.bool()].tolist() == expected
        assert (ids[~mask.bool()] == 0).all()
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")


def test_truncation_keeps_the_end_token(tokenizer: SparseqTokenizer) -> None:
    ids = tokenizer.encode("The old man walks slowly in the garden.", truncation=True, max_length=4)
    assert len(ids) == 4
    assert ids[-1] == tokenizer.eos_token_id


def test_collator_pads_inputs_and_labels(tokenizer: SparseqTokenizer) -> None:
    pairs = [("<2de> A man", "Der alte Mann geht langsam."), ("<2de> The old man walks.", "Zwei")]
    features = [dict(tokenizer(source, text_target=target)) for source, target in pairs]
    batch = DataCollatorForSeq2Seq(tokenizer)(features)
    for row, feature in enumerate(features):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == feature["input_ids"]
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == feature["labels"]


def test_later_languages(tokenizer: SparseqTokenizer, tmp_path: Path) -> None:
    grown = pickle.loads(pickle.dumps(tokenizer))
    assert grown.add_language_tags(["cs", "<2de>", "zho_Hans"]) == 2
    assert grown.language_tags == ["<2de>", "<2fr>", "<2cs>", "<2zho_Hans>"]
    grown.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) + 2
    assert again.encode("<2cs> The old man") == [len(tokenizer), *tokenizer.encode("The old man")]
    assert again.encode("<2de> The old man") == tokenizer.encode("<2de> The old man")
    assert again.decode(again.encode("<2cs> The old man"), skip_special_tokens=True) == "The old man"
    assert tokenizer.language_tags == ["<2de>", "<2fr>"]


def test_ordinary_tokens_can_be_added(tokenizer: SparseqTokenizer, tmp_path: Path) -> None:
    grown = pickle.loads(pickle.dumps(tokenizer))
    assert grown.add_tokens(["[name]"]) == 1
    grown.save_pretrained(tmp_path)
    again = SparseqTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) in again.encode("My friend [name] walks")
    assert "[name]" in again.decode(again.encode("My friend [name] walks"))
    assert again.encode("The old man") == tokenizer.encode("The old man")


def test_a_model_grows_with_the_tokenizer(tokenizer: SparseqTokenizer) -> None:
    config = SparseqConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_num_key_value_heads=1,
        decoder_num_key_value_heads=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_experts=0,
    )
    model = SparseqForConditionalGeneration(config)
    grown = pickle.loads(pickle.dumps(tokenizer))
    grown.add_language_tags(["cs"])
    model.resize_token_embeddings(len(grown))
    batch = grown("<2cs> The old man", text_target="Der alte Mann", return_tensors="pt")
    output = model(**batch)
    assert output.logits.shape[-1] == len(tokenizer) + 1
    assert torch.isfinite(output.loss)


def test_pickle(tokenizer: SparseqTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert type(copy) is SparseqTokenizer
    assert copy.language_tags == tokenizer.language_tags
    assert copy(NASTY)["input_ids"] == tokenizer(NASTY)["input_ids"]


def test_map_in_several_processes(tokenizer: SparseqTokenizer, corpus: list[str]) -> None:
    table = datasets.Dataset.from_dict({"text": corpus[:8]})
    mapped = table.map(lambda rows: tokenizer(rows["text"]), batched=True, batch_size=2, num_proc=2)
    assert mapped["input_ids"][:] == tokenizer(corpus[:8])["input_ids"]


@pytest.mark.parametrize(
    ("language", "tag"), [("de", "<2de>"), ("<2de>", "<2de>"), ("pt-BR", "<2pt-BR>"), ("zho_Hans", "<2zho_Hans>")]
)
def test_language_tag(language: str, tag: str) -> None:
    assert language_tag(language) == tag


@pytest.mark.parametrize("language", ["", "d e", "<de>", "de>", "<2de", "2de", "de_", "dé", "de\n"])
def test_bad_language(language: str) -> None:
    with pytest.raises(ValueError, match="is not a language code"):
        language_tag(language)


def test_languages_are_a_list(tokenizer: SparseqTokenizer) -> None:
    with pytest.raises(ValueError, match="must be a list"):
        tokenizer.add_language_tags("de")
