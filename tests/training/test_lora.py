"""LoRA presets: what they reach, that adapters travel, merge and take turns, and that forgotten experts are loud."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForSeq2SeqLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from sparseq import SparseqForConditionalGeneration
from sparseq.modeling_sparseq import SparseqExperts
from sparseq.training.callback import SparseqCallback
from sparseq.training.lora import Preset, lora_config, refuse_frozen_experts
from sparseq.training.recipes import build_recipe
from sparseq.training.sections import LoraRecipe
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments
from tests.absent import run_without_package
from tests.tiny import source_batch, tiny_model
from tests.tolerances import assert_close
from tests.training.stock import Collator, examples, stock_trainer

PRESETS: tuple[Preset, ...] = ("attention", "experts", "all")
KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "gated with biases": {"expert_bias": True, "attention_bias": True, "ffn_bias": True, "num_shared_experts": 2},
    "plain": {"gated_ffn": False, "encoder_sparse_step": 2},
    "plain with biases": {"gated_ffn": False, "expert_bias": True, "num_shared_experts": 1, "decoder_sparse_step": 2},
    "decoder only": {"encoder_sparse_step": 0, "num_shared_experts": 1},
    "dense": {"num_experts": 0},
}
IMPLEMENTATIONS = ["sparseq", "eager", "grouped_mm", "batched_mm"]


def base(kind: str = "gated", **overrides: Any) -> SparseqForConditionalGeneration:
    # Logits about 1, so that an absolute bound on rounding means something.
    return tiny_model(**{"initializer_range": 0.05, "tie_word_embeddings": False, **KINDS[kind], **overrides})


def adapted(model: Any, preset: Preset = "all", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config(model, preset, rank=4, **options))


def trained(model: Any, steps: int = 3) -> Any:
    """After a few steps, large enough to change what the model says."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**Collator()(examples())).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**Collator()(examples())).logits


def expected_targets(model: SparseqForConditionalGeneration, preset: Preset) -> set[str]:
    """The weights that a preset should reach, by walking over the modules."""
    names = set()
    for name, module in model.named_modules():
        is_attention = "attn" in name
        is_expert = "experts" in name
        is_layer = isinstance(module, nn.Linear) and name != "lm_head"
        wanted = {"attention": is_attention, "experts": is_expert, "all": True}[preset]
        if is_layer and wanted:
            names.add(f"{name}.weight")
        if isinstance(module, SparseqExperts) and wanted:
            names |= {f"{name}.{parameter}" for parameter, value in module.named_parameters() if value.dim() == 3}
    return names


def changed_weights(before: Any, after: Any) -> set[str]:
    old = dict(before.named_parameters())
    return {name for name, value in after.named_parameters() if not torch.equal(value, old[name])}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_preset_changes_exactly_the_weights_it_names(kind: str, preset: Preset) -> None:
    if (kind, preset) == ("dense", "experts"):
        with pytest.raises(ValueError, match=r'"experts" needs a model with experts.*use "attention", or "all"'):
            lora_config(base(kind), preset)
        return
    model = trained(adapted(base(kind), preset))
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    refuse_frozen_experts(model)
    assert changed_weights(base(kind), model.merge_and_unload()) == expected_targets(base(kind), preset)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["gated", "gated with biases", "plain", "plain with biases"])
def test_merging_changes_nothing(kind: str, implementation: str) -> None:
    plain = base(kind)
    plain.set_experts_implementation(implementation)
    model = trained(adapted(plain))
    expected = logits(model)
    assert (expected - logits(base(kind))).abs().max() > 0.1
    merged = model.merge_and_unload()
    assert merged.config._experts_implementation == implementation
    assert (logits(merged) - expected).abs().max() <= 1e-6


def test_merging_is_exact_up_to_rounding() -> None:
    model = trained(adapted(base("gated with biases").double()))
    expected = logits(model)
    assert_close(logits(model.merge_and_unload()), expected, torch.float64)


@pytest.mark.parametrize("kind", ["gated", "plain with biases"])
def test_every_experts_implementation_trains_an_adapter_alike(kind: str) -> None:
    results = []
    for implementation in IMPLEMENTATIONS:
        model = base(kind)
        model.set_experts_implementation(implementation)
        results.append(logits(trained(adapted(model))))
    for result in results[1:]:
        assert_close(result, results[0], torch.float32)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(base(), init_lora_weights=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**Collator()(examples())).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, an adapter of it, what the two compute together, and the merged model."""
    root = tmp_path_factory.mktemp("lora")
    base("gated with biases").save_pretrained(root / "base")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(root / "base")
    model = trained(adapted(loaded, train_routers=True))
    model.save_pretrained(root / "adapter")
    generated = model.generate(input_ids=source_batch(), max_new_tokens=8)
    save_file({"logits": logits(model), "generated": generated, "source": source_batch()}, root / "expected")
    model.merge_and_unload().save_pretrained(root / "merged")
    return root


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel", "AutoModel"])
def test_a_saved_adapter_loads(way: str, folders: Path) -> None:
    if way == "PeftModel":
        model: Any = PeftModel.from_pretrained(
            AutoModelForSeq2SeqLM.from_pretrained(folders / "base"), folders / "adapter"
        )
    elif way == "AutoPeftModel":
        model = AutoPeftModelForSeq2SeqLM.from_pretrained(folders / "adapter")
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(folders / "adapter")
    expected = load_file(folders / "expected")
    assert torch.equal(logits(model.eval()), expected["logits"])
    assert torch.equal(model.generate(input_ids=source_batch(), max_new_tokens=8), expected["generated"])


_GENERATE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

torch.set_num_threads(1)
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model.generate(input_ids=load_file(sys.argv[2])["source"], max_new_tokens=8).tolist())
"""


def test_the_merged_model_loads_with_and_without_the_package(folders: Path, tmp_path: Path) -> None:
    expected = load_file(folders / "expected")
    model = AutoModelForSeq2SeqLM.from_pretrained(folders / "merged").eval()
    assert (logits(model) - expected["logits"]).abs().max() <= 1e-6
    assert torch.equal(model.generate(input_ids=source_batch(), max_new_tokens=8), expected["generated"])
    printed = run_without_package(_GENERATE, folders / "merged", folders / "expected", home=tmp_path)
    assert json.loads(printed) == expected["generated"].tolist()


def test_two_adapters_take_turns() -> None:
    model = adapted(base())
    model.add_adapter("second", lora_config(model, "all", rank=2))
    model.add_adapter("third", lora_config(model, "attention"))
    plain = logits(base())
    first = logits(trained(model))
    for name in ("second", "third"):
        model.set_adapter(name)
        assert torch.equal(logits(model), plain)
        assert not torch.allclose(logits(trained(model)), plain, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("balancing", ["aux_loss", "loss_free"])
def test_routers_are_trained_beside_an_adapter(balancing: str, tmp_path: Path) -> None:
    model = adapted(base(router_balancing=balancing, router_bias_update_rate=0.1), train_routers=True)
    trainer = stock_trainer(tmp_path, model, callbacks=[SparseqCallback()], max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert "router/max_vio" in logs[0]
    routers = model.get_base_model().routers("encoder")
    old = base(router_balancing=balancing).routers("encoder")
    for router, before in zip(routers, old, strict=True):
        assert not torch.equal(router.weight, before.weight)
        assert balancing == "aux_loss" or router.e_score_correction_bias.any()


def test_training_an_adapter_computes_logits_at_labels_only(tmp_path: Path) -> None:
    model = adapted(base())
    asked: list[Any] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs.get("skip_logits")), with_kwargs=True
    )
    arguments = SparseqTrainingArguments(
        str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    SparseqTrainer(model=model, args=arguments, train_dataset=examples(), data_collator=Collator()).train()
    assert asked == [True]


# PEFT writes into the configurations it is given, so each test takes copies.
FORGETFUL = {
    "all-linear": LoraConfig(target_modules="all-linear"),
    "attention by hand": LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"]),
    "misspelt parameter": LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.up_proj"]),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
}
DELIBERATE = {
    "all-linear": LoraConfig(target_modules="all-linear", exclude_modules=["experts"]),
    "regular expression": LoraConfig(target_modules=["q_proj"], exclude_modules=r".*\.mlp\.(experts|router)"),
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], exclude_modules=["mlp.experts"]),
    "experts trained whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]),
    "half of an expert": LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
}


@pytest.mark.filterwarnings("ignore:target_parameters=")
@pytest.mark.parametrize("name", FORGETFUL)
def test_experts_left_frozen_by_mistake_stop_every_trainer(name: str, tmp_path: Path) -> None:
    message = (
        r"trains no routed expert.*4 expert layers.*lora_config\(model, \"all\"\).*exclude_modules=\[\"experts\"\]"
    )
    model: Any = get_peft_model(base(), deepcopy(FORGETFUL[name]))
    with pytest.raises(ValueError, match=message):
        stock_trainer(tmp_path, model, callbacks=[SparseqCallback()])
    with pytest.raises(ValueError, match=message):
        SparseqTrainer(model=model, args=SparseqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    # Where the library itself adds the adapter, and inside another wrapper.
    inner = base()
    inner.add_adapter(deepcopy(FORGETFUL[name]))
    with pytest.raises(ValueError, match=message):
        refuse_frozen_experts(nn.Sequential(inner))


def test_a_model_adapted_after_the_trainer_was_made_is_stopped_too(tmp_path: Path) -> None:
    trainer = stock_trainer(tmp_path, base(), callbacks=[SparseqCallback()])
    trainer.model = trainer.model_wrapped = get_peft_model(base(), deepcopy(FORGETFUL["all-linear"]))
    with pytest.raises(ValueError, match="trains no routed expert"):
        trainer.train()


@pytest.mark.parametrize("name", DELIBERATE)
def test_experts_left_out_on_purpose_are_no_mistake(name: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(base(), deepcopy(DELIBERATE[name]))
    stock_trainer(tmp_path, model, callbacks=[SparseqCallback()]).train()


def test_a_loaded_adapter_remembers_that_it_leaves_experts_alone(tmp_path: Path) -> None:
    adapted(base(), "attention").save_pretrained(tmp_path)
    refuse_frozen_experts(PeftModel.from_pretrained(base(), tmp_path, is_trainable=True))


def test_what_trains_nothing_or_has_no_experts_is_let_through(tmp_path: Path) -> None:
    get_peft_model(base(), deepcopy(FORGETFUL["attention by hand"])).save_pretrained(str(tmp_path))
    for_inference: Any = PeftModel.from_pretrained(base(), tmp_path)
    stock_trainer(tmp_path, for_inference, callbacks=[SparseqCallback()]).evaluate()
    refuse_frozen_experts(get_peft_model(base("dense"), LoraConfig(target_modules="all-linear")))
    refuse_frozen_experts(base())


def test_an_adapter_on_a_router_s_weight_is_refused(tmp_path: Path) -> None:
    model: Any = get_peft_model(base(), LoraConfig(target_parameters=["mlp.router.weight"]))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.router.*modules_to_save=\[\"router\"\]"):
        stock_trainer(tmp_path, model, callbacks=[SparseqCallback()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "expert"}, "`preset` must be one of attention, experts, all, but is 'expert'"),
        ({"rank": 0}, "`rank` must be at least 1, but is 0"),
        ({"alpha": 0}, "`alpha` must be above 0, but is 0"),
        ({"target_modules": ["q_proj"]}, "`target_modules`: decided by `preset`"),
        ({"lora_dropout": 0.1}, "`lora_dropout` is 0.1, but preset 'all' adapts stacked experts.*`expert_dropout`"),
        ({"use_dora": True}, "`use_dora` works on linear layers only, but preset 'all'"),
        ({"lora_bias": True}, "`lora_bias` works on linear layers only"),
        ({"layers_to_transform": [0]}, "`layers_to_transform` works on linear layers only"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'.*may be True, False, 'gaussian'"),
    ],
)
def test_mistakes_are_named_before_the_model_is_touched(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_config(base(), **{"preset": "all", **options})


def test_attention_takes_what_experts_cannot() -> None:
    model = adapted(base(), "attention", lora_dropout=0.1, use_dora=True)
    assert logits(trained(model)).isfinite().all()
    assert lora_config(base("dense"), "all", lora_dropout=0.1).lora_dropout == 0.1


def test_other_models_and_routers_of_dense_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="for Sparseq models, but got Linear"):
        lora_config(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="for Sparseq models, but got T5ForConditionalGeneration"):
        lora_config(T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1)))
    with pytest.raises(ValueError, match="`train_routers` needs a model with experts"):
        lora_config(base("dense"), "attention", train_routers=True)


def test_the_code_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "lora.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    merged = AutoModelForSeq2SeqLM.from_pretrained("merged").eval()
    again = AutoPeftModelForSeq2SeqLM.from_pretrained("adapter").eval()
    assert_close(logits(merged), logits(again), torch.float32)
    plain = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained("base"), names["quiet"])
    refuse_frozen_experts(plain)
    assert not torch.allclose(logits(plain), logits(merged), atol=1e-3)
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    assert build_recipe("document", recipe).lora == LoraRecipe(rank=8, alpha=16)
