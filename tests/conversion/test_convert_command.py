"""`sparseq convert` from one end to the other; what becomes of each family's weights is tested in test_import.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from sparseq import SparseqForConditionalGeneration
from sparseq.cli import main
from sparseq.conversion import equality, tokenizers
from sparseq.hub.facts import facts_of_card
from sparseq.loading import load_model
from sparseq.modeling_sparseq import CODE_FILES
from tests.absent import run_without_package
from tests.conversion.checkpoints import write_checkpoint, write_marian
from tests.conversion.tokenizer_folders import SENTENCES, write_json
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marian(tmp_path_factory.mktemp("sources") / "marian")


def convert(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    """Runs the command; what it printed, or the line of its error."""
    assert main(["convert", *map(str, arguments)]) == status
    printed = capsys.readouterr()
    return printed.err.partition("sparseq: error: ")[2].splitlines()[0] if status else printed.out


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text("utf-8")) | fields)


def test_a_checkpoint_becomes_a_folder_that_is_complete(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "models" / "converted"
    said = convert(capsys, marian, output, "--check", "--max-shard-size", "30KB")
    shards = set(output.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert {path.name for path in set(output.iterdir()) - shards} == {
        *("config.json", "generation_config.json", *CODE_FILES),
        *("source.spm", "target.spm", "vocab.json", "tokenizer_config.json", "LICENSE", "conversion.json"),
        "model.safetensors.index.json",
    }
    assert list(output.parent.iterdir()) == [output]
    settings = GenerationConfig.from_pretrained(output)
    pad = settings.pad_token_id
    assert (settings.num_beams, settings.max_length, settings.bad_words_ids) == (2, 20, [[pad]])
    record = json.loads((output / "conversion.json").read_text("utf-8"))
    assert record["command"] == f"sparseq convert {marian}"
    stored = torch.load(marian / "pytorch_model.bin", weights_only=True)
    used = {name for one in record["tensors"] for name in one["from"]} | {one["name"] for one in record["left_out"]}
    assert used == stored.keys()
    assert f"{len(stored)} tensors read" in said
    assert "greedy output is the same" in record["notes"][-1]
    assert record["notes"][-1] in said
    assert "table of sinusoids" in said
    assert "README.md of the source names no license; LICENSE is copied." in said
    # Everything that config.json says has a place.
    assert "Not carried over" not in said

    # As somebody uses it who has neither this package nor any trust in the tokenizer.
    texts = SENTENCES[:3]
    seen = json.loads(
        run_without_package(
            "import json, torch\n"
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
            "torch.set_num_threads(1)\n"
            "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
            "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
            f"batch = tokenizer({texts!r}, padding=True, return_tensors='pt')\n"
            "print(json.dumps([type(tokenizer).__name__, batch['input_ids'].tolist(), "
            "model.generate(**batch).tolist()]))\n",
            output,
            home=tmp_path,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(marian)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    expected = AutoModelForSeq2SeqLM.from_pretrained(marian).generate(**batch, generation_config=settings)
    assert seen == ["MarianTokenizer", batch["input_ids"].tolist(), expected.tolist()]


def test_a_dry_run_writes_nothing(marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = convert(capsys, marian, tmp_path / "converted", "--dry-run")
    assert " tensors read, " in said
    assert list(tmp_path.iterdir()) == []
    assert "--dry-run writes none" in convert(capsys, marian, tmp_path / "converted", "--dry-run", "--check", status=2)
    # It tells what the conversion tells.
    done, _, place = convert(capsys, marian, tmp_path / "converted").rstrip("\n").rpartition("\n")
    assert done == said.rstrip("\n")
    assert place == f"The model is in {tmp_path / 'converted'}."


def test_the_license_of_the_source_gets_into_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_checkpoint("bart", tmp_path / "source"), tmp_path / "converted"
    assert "No license was found in the source" in convert(capsys, source, output, "--dry-run")
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nlanguage: en\n---\n# Ours\n", encoding="utf-8")
    said = convert(capsys, source, output)
    assert "The source has the license cc-by-nc-4.0, which" in said
    assert json.loads((output / "conversion.json").read_text("utf-8"))["license"] == "cc-by-nc-4.0"
    # No text of somebody's, so it is replaced without --force.
    assert main(["card", str(output)]) == 0
    card = (output / "README.md").read_text("utf-8")
    assert facts_of_card(card).license == "cc-by-nc-4.0"
    assert "# Ours" not in card
    # And into what is made of the result, with what it comes from.
    (output / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: owner/bart\n---\n", encoding="utf-8")
    assert main(["export", str(output), str(tmp_path / "back"), "--to", "bart"]) == 0
    options = ["--experts", "2", "--experts-per-token", "1", "--layers", "every"]
    assert main(["upcycle", str(output), str(tmp_path / "experts"), *options]) == 0
    for made in ("back", "experts"):
        facts = facts_of_card((tmp_path / made / "README.md").read_text("utf-8"))
        assert (facts.license, facts.base_model) == ("cc-by-nc-4.0", "owner/bart")


def test_only_a_models_folder_is_replaced(marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "converted"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "--force" in convert(capsys, marian, output, status=2)
    assert (output / "notes.txt").exists()
    convert(capsys, marian, output, "--force", "--dtype", "bfloat16")
    assert not (output / "notes.txt").exists()
    assert {one.dtype for one in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert 'dtype": "bfloat16' in (output / "config.json").read_text("utf-8")
    assert "must stay" in convert(capsys, marian, marian, "--force", status=2)


def test_what_cannot_be_converted_is_a_message(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(marian, source)
    for fields, answer in (
        ({"model_type": "t5"}, "'t5' cannot be converted. Those that can: bart, "),
        ({"model_type": "no-such-type"}, "Those that can: bart, "),
        ({"model_type": "sparseq"}, "is a Sparseq model already"),
        ({"model_type": "marian", "decoder_vocab_size": 7}, "`decoder_vocab_size` is 7"),
        ({"num_hidden_layers": 7}, "has `num_hidden_layers` 7 and `encoder_layers` "),
    ):
        change_config(source, **fields)
        assert answer in convert(capsys, source, tmp_path / "converted", status=2)
    SparseqForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "ours")
    assert "is a Sparseq model already" in convert(capsys, tmp_path / "ours", tmp_path / "converted", status=2)
    assert not (tmp_path / "converted").exists()


def test_a_start_token_is_looked_for_in_the_generation_settings_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_checkpoint("bart", tmp_path / "source"), tmp_path / "converted"
    change_config(source, decoder_start_token_id=None, bos_token_id=None)
    path = source / "generation_config.json"
    settings = json.loads(path.read_text("utf-8"))
    write_json(path, settings | {"decoder_start_token_id": None, "bos_token_id": None})
    assert "`decoder_start_token_id` is None" in convert(capsys, source, output, status=2)
    write_json(path, settings | {"decoder_start_token_id": 2, "bos_token_id": None})
    convert(capsys, source, output)
    assert json.loads((output / "config.json").read_text("utf-8"))["decoder_start_token_id"] == 2


def test_a_check_that_fails_leaves_nothing(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(folder: Path) -> Any:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.encoder.layers.0.mlp.up_proj.bias"] += 0.01
        save_file(tensors, path, metadata={"format": "pt"})
        return load_model(AutoModelForSeq2SeqLM, folder, dtype=torch.float32)

    with monkeypatch.context() as patch:
        patch.setattr(equality, "load_model", lambda auto_class, folder, **options: wrong(folder))
        said = convert(capsys, marian, tmp_path / "converted", "--check", status=2)
    assert "differ by at most" in said
    assert "nothing was written" in said
    assert list(tmp_path.iterdir()) == []
    # Of another data type, weights differ by rounding; the difference is said, and no error.
    assert main(["convert", str(marian), str(tmp_path / "converted"), "--check", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "numbers that were rounded differ" in printed
    difference = float(printed.partition("differ by at most ")[2].split(",")[0])
    assert difference > equality.LARGEST_DIFFERENCE


def test_a_check_finds_other_text_from_the_same_logits(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(auto_class: Any, folder: Path, **options: Any) -> Any:
        model: Any = load_model(auto_class, folder, **options)
        model.generate = lambda input_ids, **settings: input_ids[:, :1]
        return model

    monkeypatch.setattr(equality, "load_model", silent)
    said = convert(capsys, marian, tmp_path / "converted", "--check", status=2)
    assert "greedy output differs" in said


def test_a_tokenizer_that_cannot_be_carried_over_is_found_before_weights_are_written(
    marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, folder: Path, **options: Any) -> None:
        assert (folder / "config.json").is_file()
        assert not list(folder.glob("*.safetensors"))
        raise ValueError("The tokenizer cannot be carried over.")

    convert(capsys, marian, tmp_path / "converted")
    monkeypatch.setattr(tokenizers, "carry_tokenizer", refuse)
    assert convert(capsys, marian, tmp_path / "again", status=2) == "The tokenizer cannot be carried over."
    assert main(["export", str(tmp_path / "converted"), str(tmp_path / "out"), "--to", "marian"]) == 2
    assert "The tokenizer cannot be carried over." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]


def test_a_check_of_what_the_library_cannot_load_is_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint("bart", tmp_path / "source", layout="shards")
    path = source / "model.safetensors.index.json"
    write_json(path, {"weight_map": json.loads(path.read_text("utf-8"))["weight_map"]})
    said = convert(capsys, source, tmp_path / "converted", "--check", status=2)
    assert "transformers cannot load" in said
    assert "'metadata'" in said
    convert(capsys, source, tmp_path / "converted")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_that_was_rounded_once_is_told_of(
    dtype: torch.dtype, marian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(marian, source)
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({name: one.to(dtype).float() for name, one in tensors.items()}, source / "pytorch_model.bin")
    said = convert(capsys, source, tmp_path / "converted", "--check")
    line = next(line for line in said.splitlines() if "table of sinusoids" in line)
    assert f"there rounded to {str(dtype).removeprefix('torch.')}, by up to " in line
    exact = tensors["model.encoder.embed_positions.weight"]
    assert float(line.rpartition(" ")[2]) == pytest.approx(float((exact.to(dtype) - exact).abs().max()), rel=0.1)
    # What the library computes with the rounded table differs, and rightly so.
    assert "numbers that were rounded differ" in said


def test_a_check_of_experts_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "config.json", {"model_type": "nllb-moe", "d_model": 16, "encoder_sparse_step": 2})
    said = convert(capsys, tmp_path, tmp_path / "converted", "--check", status=2)
    assert "NLLB-MoE runs experts other than" in said


@pytest.mark.parametrize(
    ("name", "code", "unknown"),
    [("mbart", "de_DE", "de_CH"), ("mbart50", "gl_ES", "gl_XX"), ("nllb", "deu_Latn", "deu")],
)
def test_a_model_of_many_languages_is_told_its_target(
    name: str, code: str, unknown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And mBART, which begins with it, is not converted without."""
    source, output = tmp_path / "source", tmp_path / "converted"
    write_checkpoint(name, source)
    if name == "mbart":
        change_config(source, decoder_start_token_id=None)
        settings = json.loads((source / "generation_config.json").read_text("utf-8"))
        write_json(source / "generation_config.json", settings | {"decoder_start_token_id": None})
        assert "name one with --target-language" in convert(capsys, source, output, status=2)
    assert "not this one" in convert(capsys, source, output, "--target-language", unknown, status=2)
    said = convert(capsys, source, output, "--target-language", code, "--check")
    assert f"Translates into {code}" in said

    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForSeq2SeqLM.from_pretrained(output)
    generated = model.generate(**tokenizer(SENTENCES[:2], padding=True, return_tensors="pt"), max_new_tokens=4)
    place = 0 if name == "mbart" else 1
    assert generated[:, place].tolist() == [tokenizer.convert_tokens_to_ids(code)] * 2
    # Text that it learns from is marked with the same code.
    assert tokenizer.convert_tokens_to_ids(code) in tokenizer(text_target="Ein Mann")["input_ids"]


def test_a_checkpoint_without_tokenizer_or_maximum_length_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint("bart", tmp_path / "source")
    for path in (*source.glob("*vocab*"), *source.glob("tokenizer*"), *source.glob("merges.txt")):
        path.unlink()
    (source / "generation_config.json").unlink()
    said = convert(capsys, source, tmp_path / "converted")
    assert "has no tokenizer" in said
    assert "`max_length` is " in said
    said = convert(capsys, source, tmp_path / "other", "--target-language", "de", status=2)
    assert "has no tokenizer that knows languages" in said
