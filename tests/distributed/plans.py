"""What two processes do with a model that `DistributedConfig` has cut; the tests do the same with a whole one."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedModel
from transformers.distributed import DistributedConfig

from sparseq import SparseqForConditionalGeneration
from sparseq.training.callback import SparseqCallback
from tests.distributed.launching import launch_environment
from tests.tiny import label_batch, source_batch, tiny_model
from tests.training.stock import STRONG_LOSSES, selection_biases, stock_trainer

PLANS: dict[str, dict[str, Any]] = {
    "tensors": {"tp_size": 2, "tp_plan": "auto"},
    "tensors and experts": {"tp_size": 2, "ep_size": 2},
    "shards": {"fsdp_size": 2},
    "shards and experts": {"fsdp_size": 2, "ep_size": 2},
}
# Tensor parallelism needs key-value heads that can be shared out.
COMMON: dict[str, Any] = {**STRONG_LOSSES, "label_smoothing": 0.1, "decoder_num_key_value_heads": 2}
DENSE: dict[str, dict[str, Any]] = {
    "dense gated": {"num_experts": 0, "position_embedding_type": "learned"},
    "dense plain 2017": {
        "num_experts": 0,
        "gated_ffn": False,
        "activation_function": "relu",
        "attention_bias": True,
        "ffn_bias": True,
        "norm_position": "post",
        "norm_type": "layernorm",
        "embedding_norm": True,
        "final_logits_bias": True,
        "position_embedding_type": "sinusoidal",
        "tie_word_embeddings": False,
    },
}
SPARSE: dict[str, dict[str, Any]] = {
    "sparse gated": {},
    # Of 61 tokens, the processes get 31 and 30.
    "sparse plain shared": {
        "gated_ffn": False,
        "num_shared_experts": 1,
        "encoder_sparse_step": 2,
        "share_encoder_decoder_embeddings": False,
        "vocab_size": 61,
    },
    "sparse untied loss-free": {
        "router_balancing": "loss_free",
        "router_scoring": "sigmoid",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 0,
        "tie_word_embeddings": False,
        "share_encoder_decoder_embeddings": False,
    },
}
BIASED: dict[str, dict[str, Any]] = {"sparse biased": {"expert_bias": True}}
# Noise on what all processes hold must be the same noise; with shards each has sentences of its own.
NOISY: dict[str, dict[str, Any]] = {
    "sparse noisy": {
        "dropout": 0.2,
        "expert_dropout": 0.0,
        "router_jitter_noise": 0.1,
        "expert_output_masking": 0.1,
    }
}
# With as many key-value heads as four processes need.
WIDE: dict[str, dict[str, Any]] = {
    "sparse wide": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
}
MODELS = {**DENSE, **SPARSE, **BIASED, **NOISY, **WIDE}
CASES = [
    *[(plan, model) for plan in PLANS for model in (DENSE if "experts" not in plan else {}) | SPARSE],
    *[(plan, model) for plan in PLANS if plan != "tensors" for model in BIASED],
    *[(plan, model) for plan in PLANS if "tensors" in plan for model in NOISY],
]
# With separate embeddings of which one is tied to the output, Accelerate's FSDP2 fails; see docs/parallel.md.
BY_ACCELERATE = ("dense gated", "sparse gated", "sparse untied loss-free")
TRAINED = "sparse untied loss-free"
# Trainer refuses tensor parallelism over processes on a CPU.
TRAINED_PLANS = ("shards", "shards and experts")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "sparseq")
# Weights that are tied in most models, cut where the library's default does not cut them.
UNTIED_PLANS = {"other": {"lm_head": "rowwise_split_input"}, "whole": {"lm_head": "replicate"}}

SOURCE_LENGTHS, TARGET_LENGTHS = (9, 6, 8, 3), (7, 5, 4, 6)


def rank() -> int:
    """Which process this is."""
    return int(os.environ["RANK"])


def whole_model(model: str, **overrides: Any) -> SparseqForConditionalGeneration:
    """One of `MODELS`, uncut."""
    return tiny_model(**{**COMMON, **MODELS[model], **overrides})


def cut_model(
    folder: Path,
    plan: str,
    model: str,
    auto_class: Any = SparseqForConditionalGeneration,
    rules: dict[str, str] | None = None,
    plans: dict[str, dict[str, Any]] = PLANS,
    **arguments: Any,
) -> Any:
    """The same weights, cut; `rules` take the place of the plan's own, which is one of `plans`."""
    # The first process saves it, when none reads any longer what was there before.
    torch.distributed.barrier()
    whole_model(model).save_pretrained(folder / "start")
    torch.distributed.barrier()
    fields = plans[plan] if rules is None else {**plans[plan], "tp_plan": rules}
    return auto_class.from_pretrained(folder / "start", distributed_config=DistributedConfig(**fields), **arguments)


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of which each process has a part, put together."""
    if tensor is None:
        return None
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def generate(model: PreTrainedModel, source: torch.Tensor, **options: Any) -> torch.Tensor:
    """Tokens after the start token, always eight of them."""
    with torch.no_grad():
        return model.generate(source, min_new_tokens=8, max_new_tokens=8, do_sample=False, **options)


def observe(
    model: Any, folder: Path, *, share: int | None = None, save: bool = True, **options: Any
) -> dict[str, Any]:
    """
    Text of four sources, then one update, whose weights are saved.

    Args:
        share: Which half of the sentences is this process'; all of them are when None.
        save: Save the model after the update.
        options: For `generate`.
    """
    rows = slice(None) if share is None else slice(share, None, 2)
    source, labels = source_batch(SOURCE_LENGTHS), label_batch(TARGET_LENGTHS)
    num_items = labels.ne(-100).sum()
    source, labels = source[rows].contiguous(), labels[rows].contiguous()
    # Before any forward: FSDP2 leaves some weights gathered, which an optimizer would then take for the model's.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Any] = {
        "greedy": generate(model, source, **options),
        "beams": generate(model, source, num_beams=4, **options),
        "static cache": generate(model, source, cache_implementation="static", **options),
    }
    torch.manual_seed(5)
    output = model.train()(input_ids=source, labels=labels, num_items_in_batch=num_items)
    # As Trainer does it, because gradients are averaged over the processes that have other sentences.
    (output.loss * (1 if share is None else 2)).backward()
    terms = ["loss", *(f"{stack}_{term}_loss" for stack in ("encoder", "decoder") for term in ("aux", "z"))]
    found["losses"] = {name: output[name].detach() for name in terms if output.get(name) is not None}
    found["gradients"] = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    optimizer.step()
    if model.config.router_balancing == "loss_free":
        model.update_router_bias()
    found["biases"] = selection_biases(model)
    found["active parameters"] = model.num_active_parameters()
    if save:
        model.save_pretrained(folder / "saved")
    return found


def cut(folder: Path, plan: str, model: str) -> dict[str, Any]:
    """`observe` on two processes."""
    return observe(cut_model(folder, plan, model), folder, share=rank() if "shards" in plan else None)


def implementation(folder: Path, name: str) -> dict[str, Any]:
    """An experts implementation where each process has half of the experts."""
    plan = "tensors and experts"
    return observe(cut_model(folder, plan, "sparse gated", experts_implementation=name), folder)


def states(folder: Path, plan: str) -> dict[str, Any]:
    """Last hidden states of the models without an output projection."""
    source = source_batch(SOURCE_LENGTHS)
    with torch.no_grad():
        bare = cut_model(folder, plan, "sparse gated", AutoModel)(input_ids=source, decoder_input_ids=source)
        encoder = cut_model(folder, plan, "sparse gated", AutoModelForTextEncoding)(input_ids=source)
    return {"bare": bare.last_hidden_state, "encoder": encoder.last_hidden_state}


def unequal(folder: Path) -> dict[str, Any]:
    """Text of one sentence on the first process, and of three and longer text on the second."""
    model = cut_model(folder, "shards", "dense gated")
    return {"text": generate_share(model, rank())}


def generate_share(model: PreTrainedModel, share: int) -> torch.Tensor:
    """The text of `unequal`."""
    source = source_batch(SOURCE_LENGTHS)
    source, length = (source[:1], 3) if share == 0 else (source[1:], 9)
    with torch.no_grad():
        return model.generate(source, min_new_tokens=length, max_new_tokens=length)


def by_accelerate(folder: Path, model: str) -> dict[str, Any]:
    """
    `observe` with FSDP2 as Accelerate applies it for `recipes/accelerate/fsdp2.yaml`. Its function is called here,
    because `Accelerator` itself takes processes on a CPU for DDP.
    """
    settings = {name: value for name, value in launch_environment("fsdp2").items() if name.startswith("FSDP_")}
    with mock.patch.dict(os.environ, settings):
        plugin = FullyShardedDataParallelPlugin()
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        is_main_process=rank() == 0,
        mixed_precision="no",
    )
    sharded = fsdp2_prepare_model(accelerator, whole_model(model))
    # Which Trainer would do through `accelerator.get_state_dict`.
    return observe(sharded, folder, share=rank(), save=False, synced_gpus=True)


def train_cut(folder: Path, plan: str) -> dict[str, Any]:
    """`trained` on two processes."""
    return trained(folder, cut_model(folder, plan, TRAINED), size=8)


def trained(folder: Path, model: Any, *, size: int) -> dict[str, Any]:
    """Two updates by a stock Trainer with `SparseqCallback`, the text of its predictions, and its saved weights."""
    trainer = stock_trainer(
        folder,
        model.train(),
        callbacks=[SparseqCallback()],
        per_device_train_batch_size=size,
        max_steps=2,
        predict_with_generate=True,
    )
    trainer.train()
    text = trainer.predict(trainer.eval_dataset).predictions
    trainer.save_model(str(folder / "saved"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"logs": logs, "text": torch.from_numpy(text)}


def refusals(folder: Path) -> dict[str, Any]:
    """What loading says of plans that cut tied weights differently, and of a model that cannot be cut."""
    messages = {}
    for name, rules in UNTIED_PLANS.items():
        messages[name] = refusal(lambda rules=rules: cut_model(folder, "tensors", "sparse gated", rules=rules))
    messages["biased"] = refusal(lambda: cut_model(folder, "tensors", "sparse biased"))
    return messages


def refusal(load: Callable[[], Any]) -> str:
    """The message of the ValueError that `load` ends with."""
    try:
        load()
    except ValueError as error:
        return str(error)
    return ""


# By name, what each of two processes does in a folder that both share.
SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"{plan}, {model}": lambda folder, case=(plan, model): cut(folder, *case) for plan, model in CASES},
    **{f"implementation {name}": lambda folder, name=name: implementation(folder, name) for name in IMPLEMENTATIONS},
    **{f"states with {plan}": lambda folder, plan=plan: states(folder, plan) for plan in PLANS},
    "unequal": unequal,
    "refusals": refusals,
    **{
        f"Accelerate's FSDP2, {model}": lambda folder, model=model: by_accelerate(folder, model)
        for model in BY_ACCELERATE
    },
    "trained with nothing": lambda folder: trained(folder, whole_model(TRAINED), size=8),
    **{f"trained with {plan}": lambda folder, plan=plan: train_cut(folder, plan) for plan in TRAINED_PLANS},
}
