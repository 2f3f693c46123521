"""`sparseq average`: a folder that loads and holds the mean, whole or not at all, from checkpoints of any model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparseq.cli import main
from sparseq.modeling_sparseq import CODE_FILES
from sparseq.training.average_command import write_average
from sparseq.training.checkpoints import publish_checkpoint
from tests.tiny import VOCAB, source_batch, tiny_model


def marian(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = dict.fromkeys(
        ["encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"], 1
    )
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return MarianMTModel(MarianConfig(vocab_size=VOCAB, init_std=0.2, **sizes, **widths, **tokens))


def tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="w0")


def save(folder: Path, model: PreTrainedModel, *, with_tokenizer: bool = True, **options: Any) -> Path:
    """A checkpoint as Trainer leaves it, with what must not travel."""
    model.save_pretrained(folder, **options)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "README.md", "results.json"):
        (folder / name).write_text("of one checkpoint")
    return folder


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Three checkpoints of a sparse model, in a folder of a run."""
    found = []
    for seed, step in enumerate((900, 1000, 1100)):
        model = tiny_model(seed=seed)
        model.generation_config = GenerationConfig(max_length=17, num_beams=2, **_token_ids(model))
        found.append(save(tmp_path / "run" / f"checkpoint-{step}", model))
    return found


def _token_ids(model: PreTrainedModel) -> dict[str, int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return {name: getattr(model.config, name) for name in names}


def assert_is_mean(folder: Path, checkpoints: list[Path]) -> None:
    """Every tensor of the loaded model is the mean of those of the loaded checkpoints."""
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    states = [AutoModelForSeq2SeqLM.from_pretrained(checkpoint).state_dict() for checkpoint in checkpoints]
    for name, tensor in loaded.items():
        expected = torch.stack([state[name].double() for state in states]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, msg=name)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def arguments(checkpoints: list[Path], output: Path, *options: str) -> list[str]:
    return ["average", *map(str, checkpoints), "--output", str(output), *options]


def fails(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The first line of the message of a command that must fail."""
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[0]
    assert message.startswith("sparseq: error: ")
    return message


def test_the_folder_loads_and_holds_the_mean(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "average"
    assert main(arguments(checkpoints, output)) == 0
    assert_is_mean(output, checkpoints)
    assert capsys.readouterr().out.splitlines() == [
        f"The mean of 3 checkpoints is in {output}:",
        *[f"  {checkpoint}" for checkpoint in checkpoints],
    ]
    model, loading = AutoModelForSeq2SeqLM.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values())
    assert (model.generation_config.max_length, model.generation_config.num_beams) == (17, 2)
    assert model.generate(source_batch()).shape[0] == 3
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer().get_vocab()


def test_what_belongs_to_a_model_travels_and_nothing_else(checkpoints: list[Path], tmp_path: Path) -> None:
    for name in ("source.spm", "vocab.json", "sentencepiece.bpe.model", "chat_template.jinja"):
        (checkpoints[-1] / name).write_text(f"{name} of the last")
        (checkpoints[0] / name).write_text(f"{name} of the first")
    write_average(checkpoints, tmp_path / "average")
    assert files(tmp_path / "average") == {
        *("config.json", "generation_config.json", "model.safetensors", "averaging.json"),
        *(*CODE_FILES, "tokenizer.json", "tokenizer_config.json"),
        *("source.spm", "vocab.json", "sentencepiece.bpe.model", "chat_template.jinja"),
    }
    assert (tmp_path / "average" / "source.spm").read_text() == "source.spm of the last"
    note = json.loads((tmp_path / "average" / "averaging.json").read_text())
    assert note["checkpoints"] == [str(checkpoint) for checkpoint in checkpoints]


def test_it_loads_where_the_package_is_missing(checkpoints: list[Path], tmp_path: Path) -> None:
    write_average(checkpoints, tmp_path / "average")
    config = json.loads((tmp_path / "average" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"].startswith("modeling_sparseq.")
    for name in CODE_FILES:
        assert (tmp_path / "average" / name).read_text() == (checkpoints[-1] / name).read_text()


def test_sharded_checkpoints_of_another_model(tmp_path: Path) -> None:
    found = [save(tmp_path / str(seed), marian(seed), max_shard_size="8KB") for seed in range(2)]
    assert (found[0] / "model.safetensors.index.json").is_file()
    assert main(arguments(found, tmp_path / "average")) == 0
    assert_is_mean(tmp_path / "average", found)
    assert not list((tmp_path / "average").glob("*.index.json"))


def test_low_precision_is_kept(tmp_path: Path) -> None:
    found = [save(tmp_path / str(seed), marian(seed).bfloat16()) for seed in range(2)]
    write_average(found, tmp_path / "average")
    states = [AutoModelForSeq2SeqLM.from_pretrained(path).state_dict() for path in [*found, tmp_path / "average"]]
    for name, tensor in states[2].items():
        if tensor.dtype == torch.bfloat16:
            expected = torch.stack([state[name].float() for state in states[:2]]).mean(dim=0)
            assert torch.equal(tensor, expected.bfloat16()), name
    assert torch.bfloat16 in {tensor.dtype for tensor in states[2].values()}


@pytest.mark.parametrize("layout", [".", "checkpoints"])
def test_the_last_of_a_run(layout: str, checkpoints: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "moved" / layout
    folder.mkdir(parents=True)
    moved = [checkpoint.rename(folder / checkpoint.name) for checkpoint in checkpoints]
    # Later, but its saving was cut short.
    shutil.copytree(moved[0], folder / "checkpoint-2000")
    (folder / "checkpoint-2000" / "trainer_state.json").write_text('{"global_step": 20')
    assert main(["average", str(tmp_path / "moved"), "--last", "2", "--output", str(tmp_path / "average")]) == 0
    note = json.loads((tmp_path / "average" / "averaging.json").read_text())
    assert note["checkpoints"] == [str(path) for path in moved[1:]]
    assert_is_mean(tmp_path / "average", moved[1:])


def test_a_save_that_an_interruption_brought_about_does_not_count(checkpoints: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoints[0], run / "written")
    publish_checkpoint(run / "written", run / "checkpoint-1050", world_size=1, scheduled=False)
    assert main(["average", str(run), "--last", "2", "--output", str(tmp_path / "average")]) == 0
    note = json.loads((tmp_path / "average" / "averaging.json").read_text())
    assert note["checkpoints"] == [str(path) for path in checkpoints[1:]]


@pytest.mark.parametrize("layout", [".", "checkpoints"])
def test_the_tokenizer_may_lie_in_the_folder_of_the_run(layout: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = [save(run / layout / f"checkpoint-{i}", marian(i), with_tokenizer=False) for i in range(2)]
    tokenizer().save_pretrained(run)
    for name in ("train.py", "README.md", "config.json"):
        (run / name).write_text("of the run")
    write_average(found, tmp_path / "average")
    assert files(tmp_path / "average") == {
        *("config.json", "generation_config.json", "model.safetensors", "averaging.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "average").get_vocab() == tokenizer().get_vocab()


def test_an_existing_folder_is_replaced_only_by_force(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "average"
    assert main(arguments(checkpoints[:2], output)) == 0
    (output / "notes.txt").write_text("old")
    assert f"{output} is there already" in fails(arguments(checkpoints, output), capsys)
    assert_is_mean(output, checkpoints[:2])
    assert main(arguments(checkpoints, output, "--force")) == 0
    assert_is_mean(output, checkpoints)
    assert "notes.txt" not in files(output)
    assert files(tmp_path) == {"run", "average"}


def test_an_empty_folder_is_no_obstacle(checkpoints: list[Path], tmp_path: Path) -> None:
    (tmp_path / "average").mkdir()
    write_average(checkpoints, tmp_path / "average")
    assert_is_mean(tmp_path / "average", checkpoints)


def test_force_spares_what_is_more_than_a_model(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "checkpoint-5"
    shutil.copytree(checkpoints[0], other)
    for output, message in (
        (tmp_path / "run", f"{tmp_path / 'run'} holds {checkpoints[0]}, which is read and must stay"),
        (checkpoints[1], f"{checkpoints[1]} holds {checkpoints[1]}, which is read"),
        (tmp_path / "other", "holds other folders (checkpoint-5)"),
    ):
        assert message in fails(arguments(checkpoints, output, "--force"), capsys)
    assert all((path / "model.safetensors").is_file() for path in [*checkpoints, other])


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_everything_as_it_was(
    existing: bool, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "average"
    if existing:
        write_average(checkpoints[:2], output)

    def full(weights: dict[str, torch.Tensor], folder: Path, **options: Any) -> None:
        (folder / "model.safetensors").write_text("half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    with pytest.raises(OSError, match="No space left"):
        write_average(checkpoints, output, force=True)
    assert files(tmp_path) == {"run", *(["average"] if existing else [])}
    if existing:
        assert_is_mean(output, checkpoints[:2])


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_put(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "average", Path.rename
    write_average(checkpoints[:2], output)

    def unwilling(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("not now")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", unwilling)
    with pytest.raises(OSError, match="not now"):
        write_average(checkpoints, output, force=True)
    monkeypatch.undo()
    assert_is_mean(output, checkpoints[:2])
    assert files(tmp_path) == {"run", "average"}


def edit_config(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


def test_settings_of_training_may_differ(checkpoints: list[Path], tmp_path: Path) -> None:
    free = {"dropout": 0.3, "label_smoothing": 0.2, "router_aux_loss_coef": 0.5, "initializer_range": 0.1}
    edit_config(checkpoints[0], transformers_version="5.0.0", use_cache=False, **free)
    write_average(checkpoints, tmp_path / "average")
    assert_is_mean(tmp_path / "average", checkpoints)


def _other_activation(checkpoints: list[Path]) -> None:
    edit_config(checkpoints[0], activation_function="gelu")


def _other_sizes(checkpoints: list[Path]) -> None:
    save(checkpoints[0], tiny_model(d_model=16))
    edit_config(checkpoints[0], d_model=32)


def _other_tensors(checkpoints: list[Path]) -> None:
    save(checkpoints[0], tiny_model(num_experts=0))
    edit_config(checkpoints[0], num_experts=4)


def _other_tokens(checkpoints: list[Path]) -> None:
    tokenizer(VOCAB - 1).save_pretrained(checkpoints[0])


def _adapter(checkpoints: list[Path]) -> None:
    (checkpoints[0] / "config.json").rename(checkpoints[0] / "adapter_config.json")


def _quantized(checkpoints: list[Path]) -> None:
    edit_config(checkpoints[0], quantization_config={"quant_method": "bitsandbytes"})


def _no_config(checkpoints: list[Path]) -> None:
    (checkpoints[0] / "config.json").unlink()


def _half_a_config(checkpoints: list[Path]) -> None:
    (checkpoints[0] / "config.json").write_text('{"d_model": 3')


def _no_weights(checkpoints: list[Path]) -> None:
    (checkpoints[0] / "model.safetensors").unlink()


def _half_the_weights(checkpoints: list[Path]) -> None:
    path = checkpoints[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_activation, "differ in activation_function ('gelu' and 'silu')"),
        (_other_sizes, "only checkpoints of one model can be averaged"),
        (_other_tensors, "hold different tensors"),
        (_other_tokens, "have different tokenizers"),
        (_adapter, "is an adapter"),
        (_quantized, "is quantized"),
        (_no_config, "has no config.json"),
        (_half_a_config, "config.json cannot be read"),
        (_no_weights, "checkpoint-900 has n"),
        (_half_the_weights, "was its saving cut short?"),
    ],
)
def test_checkpoints_that_do_not_fit(
    spoil: Callable[[list[Path]], None],
    message: str,
    checkpoints: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(checkpoints)
    assert message in fails(arguments(checkpoints, tmp_path / "average"), capsys)
    assert files(tmp_path) == {"run"}


def test_mistakes_in_the_arguments(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "average"
    cases = [
        ([run], [], "only one folder to average"),
        ([*checkpoints, tmp_path / "none"], [], f"There is no folder {tmp_path / 'none'}"),
        ([*checkpoints, run / "." / checkpoints[0].name], [], f"{checkpoints[0]} is given twice"),
        ([run, tmp_path], ["--last", "2"], "--last takes the folder of one run, but there are 2"),
        ([run], ["--last", "1"], "--last must be at least 2, but is 1"),
        ([tmp_path / "none"], ["--last", "2"], f"There is no folder {tmp_path / 'none'}"),
        ([run], ["--last", "4"], "has 3 (checkpoint-900, checkpoint-1000, checkpoint-1100)"),
        ([tmp_path], ["--last", "2"], f"{tmp_path} has none"),
    ]
    for folders, options, message in cases:
        assert message in fails(arguments(folders, output, *options), capsys)
    (tmp_path / "file").touch()
    assert "is a file" in fails(arguments(checkpoints, tmp_path / "file", "--force"), capsys)
    assert not output.exists()
