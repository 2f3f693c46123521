"""Recipes: each that we ship is sound, the 2017 ones are the paper's, and every mistake is named."""

import math
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from sparseq.training.recipes import Recipe, build_recipe, list_recipes, load_recipe
from sparseq.training.summary import describe

SIZES = ("tiny", "small", "base", "big")


def test_the_promised_recipes_exist() -> None:
    promised = {f"{size}-{kind}" for size in SIZES for kind in ("dense", "sparse")}
    promised |= {"transformer-base-2017", "transformer-big-2017", "demo", "multi30k", "summarization"}
    assert promised <= set(list_recipes())


# Those that start from a checkpoint are in test_finetune.py.
FROM_SCRATCH = [name for name in sorted(list_recipes()) if load_recipe(name).start is None]


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_each_recipe_is_valid_and_described(name: str) -> None:
    recipe = load_recipe(name)
    config = recipe.model_config()
    assert config.vocab_size == recipe.tokenizer.vocab_size
    assert recipe.description
    assert recipe.decoding.max_length <= (config.max_position_embeddings or math.inf)
    assert recipe.training.warmup_steps < recipe.training.max_steps
    assert recipe.training.average_checkpoints * recipe.training.save_steps <= recipe.training.max_steps


# Vaswani et al. 2017, table 3: 65 and 213 million parameters.
@pytest.mark.parametrize(("size", "millions", "width", "heads"), [("base", 65, 512, 8), ("big", 213, 1024, 16)])
def test_2017_models_are_the_papers(size: str, millions: int, width: int, heads: int) -> None:
    recipe = load_recipe(f"transformer-{size}-2017")
    config = recipe.model_config()
    assert config.num_parameters() / 1e6 == pytest.approx(millions, rel=0.035)
    assert (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim) == (width, 4 * width, 4 * width)
    assert {config.encoder_attention_heads, config.decoder_num_key_value_heads} == {heads}
    assert (config.encoder_layers, config.decoder_layers, config.num_experts) == (6, 6, 0)
    assert (config.norm_position, config.norm_type, config.activation_function) == ("post", "layernorm", "relu")
    assert (config.position_embedding_type, config.sinusoidal_layout) == ("sinusoidal", "interleaved")
    assert (config.scale_embedding, config.tie_word_embeddings, config.gated_ffn) == (True, True, False)
    assert (config.dropout, config.label_smoothing) == ({"base": 0.1, "big": 0.3}[size], 0.1)
    assert (recipe.training.adam_beta1, recipe.training.adam_beta2, recipe.training.adam_epsilon) == (0.9, 0.98, 1e-9)
    assert (recipe.decoding.num_beams, recipe.decoding.length_penalty) == (4, 0.6)
    assert recipe.training.average_checkpoints == {"base": 5, "big": 20}[size]


@pytest.mark.parametrize("size", ["base", "big"])
def test_2017_learning_rate_follows_equation_3(size: str) -> None:
    recipe = load_recipe(f"transformer-{size}-2017")
    width, warmup = recipe.model_config().d_model, recipe.training.warmup_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.training.learning_rate)
    scheduler = get_scheduler(recipe.training.lr_scheduler, optimizer, num_warmup_steps=warmup)
    for step in range(1, 3 * warmup):
        optimizer.step()
        scheduler.step()
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_sparse_sizes_have_the_active_parameters_of_the_dense_ones(size: str) -> None:
    dense = load_recipe(f"{size}-dense").model_config()
    sparse = load_recipe(f"{size}-sparse").model_config()
    assert (sparse.num_experts, sparse.num_experts_per_tok) == (8, 2)
    routers = sum(len(sparse.sparse_layers(stack)) for stack in ("encoder", "decoder")) * 8 * sparse.d_model
    assert sparse.num_parameters(active=True) == dense.num_parameters() + routers
    assert sparse.num_parameters() > 1.3 * dense.num_parameters()


def test_overrides_reach_every_section() -> None:
    overrides = ["training.max_steps=7", "training.adam_epsilon=1e-8", "model.dropout=0.25", "data.source=no"]
    recipe = load_recipe("tiny-sparse", [*overrides, "seed=5", "tokenizer.path=null", "data.folder=a=b"])
    assert recipe.training.max_steps == 7
    assert recipe.model_config().dropout == 0.25
    # YAML 1.1 would read the language code of Norwegian as False, and 1e-8 as text.
    assert recipe.data.source == "no"
    assert recipe.training.adam_epsilon == 1e-8
    assert recipe.seed == 5
    assert recipe.data.folder == "a=b"


@pytest.mark.parametrize(
    ("counts", "lengths", "longest"),
    [
        ("target", ["data.max_length=9"], 9),
        ("target", ["data.max_length=500", "data.max_target_length=7"], 7),
        ("source+target", ["data.max_length=9"], 18),
        ("source+target", ["data.max_length=9", "data.max_target_length=30"], 39),
    ],
)
def test_a_budget_that_a_pair_could_exceed_is_refused(counts: str, lengths: list[str], longest: int) -> None:
    changes = [f"training.budget_counts={counts}", *lengths]
    load_recipe("tiny-sparse", [*changes, f"training.tokens_per_batch={longest}"])
    message = rf"`training\.tokens_per_batch` \({longest - 1}\).*a pair may have {longest}: .*lower `data\.max_length`"
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny-sparse", [*changes, f"training.tokens_per_batch={longest - 1}"])


def test_learned_positions_must_reach_the_longest_target() -> None:
    learned = ["model.position_embedding_type=learned", "model.max_position_embeddings=50", "data.max_length=20"]
    learned += ["decoding.max_length=20"]
    load_recipe("tiny-sparse", [*learned, "data.max_target_length=50"])
    with pytest.raises(ValueError, match=r"\(50\), but .*`data\.max_target_length` 51 and `decoding\.max_length` 20"):
        load_recipe("tiny-sparse", [*learned, "data.max_target_length=51"])


def test_a_file_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\ntraining:\n  max_steps: 10\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.training.max_steps) == ("mine", 3, 10)


def test_a_recipe_survives_the_way_through_plain_values() -> None:
    recipe = load_recipe("multi30k", ["training.max_steps=9"])
    copy = build_recipe("multi30k", recipe.to_dict())
    assert isinstance(copy, Recipe)
    assert copy == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=3", r"section training has no key `max_step` \(did you mean `max_steps`\?\)"),
        ("model.dropuot=0.1", r"section model has no key `dropuot` \(did you mean `dropout`\?\)"),
        ("modle.dropout=0.1", r"no key `modle` \(did you mean `model`\?\)"),
        ("training.max_steps=many", r"section training: .*max_steps.*int.*str"),
        ("training.max_steps=0", "`max_steps` must be above 0, but is 0"),
        ("training.adam_beta2=1.5", "`adam_beta2` must be at least 0 and below 1, but is 1.5"),
        ("training.budget_counts=words", "budget_counts.*words"),
        ("model.d_model=130", r"`d_model` must be a multiple of `encoder_attention_heads` \(4\), but is 130"),
        ("model.vocab_size=99", "`vocab_size` follows from the tokenizer; set `tokenizer.vocab_size`"),
        ("seed=-1", "`seed` must be an integer of at least 0, but is -1"),
        ("data.max_target_length=0", "`max_target_length` must be above 0, but is 0"),
        ("decoding.no_repeat_ngram_size=-1", "`no_repeat_ngram_size` must not be negative, but is -1"),
        ("training=3", "`training` is a section"),
        ("training.max_steps", "must look like training.max_steps=100"),
        ("model.rope_parameters.factor=2", "has 3 parts"),
        ("data.folder=[", "not valid YAML"),
    ],
)
def test_mistakes_in_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny-sparse", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must hold sections"),
        ("training: 3\n", "section training must hold `key: value` lines"),
        ("seed: 1\nseed: 2\n", "'seed' occurs twice"),
        ("training: {max_steps: 1\n", "not valid YAML"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'tiny-spares' \(did you mean `tiny-sparse`\?\)"):
        load_recipe("tiny-spares")
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        load_recipe(tmp_path / "absent.yaml")


def test_the_summary_states_sizes_batches_and_data(tmp_path: Path) -> None:
    for split, size in (("train", 5), ("val", 2)):
        (tmp_path / f"{split}.en").write_text("a b c\n" * size)
        (tmp_path / f"{split}.de").write_text("x y\n" * size)
    recipe = load_recipe("tiny-sparse", [f"data.folder={tmp_path}", "data.source=en", "data.target=de"])
    text = describe(recipe)
    assert f"{recipe.model_config().num_parameters():,} parameters" in text
    assert "4,096 target tokens x 2 = 8,192 an update" in text
    assert "train: 5 of 5 sentence pairs; 3.0 and 2.0 words a sentence" in text
    with pytest.raises(ValueError, match=r"needs data\.folder, data\.source, data\.target"):
        describe(load_recipe("tiny-sparse"))
