"""The one callback that a Trainer needs for a sparse model: it balances, measures, warns and refuses."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from sparseq.inspection.routing import STACKS, LayerLoad, RoutingTotals, Stack, cheap_scores
from sparseq.losses_sparseq import real_targets
from sparseq.training.lora import refuse_frozen_experts

logger = logging.get_logger(__name__)

_REQUESTS = ("output_router_logits", "output_router_indices")
# Fields of the model's output that are means over label tokens, as is the cross-entropy.
_ROUTER_LOSSES = ("encoder_aux_loss", "decoder_aux_loss", "encoder_z_loss", "decoder_z_loss")
# With more experts their loads fill every log; the least and the largest stand for them.
_MAX_LOADS = 64
# Choices per expert below which an expert without tokens may be chance: at a tenth of its fair share it would have 10
# of these, so to get none of them it must be far below that.
_CHOICES_TO_JUDGE = 100
_OWN_LOSS = (
    "For a loss of your own override `compute_loss`, pass the labels to the model and add to, or take apart, its "
    "`outputs.loss`; label smoothing is `label_smoothing` of the model's configuration."
)


class SparseqCallback(TrainerCallback):
    """
    What a sparse model needs of its Trainer, besides the loss that the model computes itself:

    - the selection biases of `router_balancing="loss_free"` move after every optimizer step;
    - training logs carry the cross-entropy, each router loss, and how the routers spread tokens since the last log
      (see `docs/training.md` for the keys);
    - evaluation and prediction metrics carry the same, so that `metric_for_best_model` may name them;
    - an expert that got no token since the last log is warned of;
    - `label_smoothing_factor`, which would drop the router losses, is refused, and so is a PEFT adapter that leaves
      all experts frozen without saying so (see `sparseq.training.lora`).

    Add it to any Trainer, `Seq2SeqTrainer(..., callbacks=[SparseqCallback()])`; `SparseqTrainer` has it. Trainer calls
    its reporters (TensorBoard, W&B, ...) before the callbacks it is given, so for them use `install` instead.

    It reads the model's output through forward hooks, in forwards that have `labels`, and waits for the device only
    when something is logged. The hooks stay after training, for `trainer.evaluate()`; `detach` removes them.

    Args:
        log_layers: Log each layer besides the averages. On the console there are averages only.
        log_load_per_expert: Log the load of each expert; otherwise, and beyond 64 experts, the least and the largest.

    Raises:
        ValueError: when the Trainer is made or training begins, if `label_smoothing_factor` is set, if an adapter
            forgets the experts, or if a loss-free model is to be trained by `nn.DataParallel`.
    """

    def __init__(self, *, log_layers: bool = True, log_load_per_expert: bool = True) -> None:
        self.log_layers = log_layers
        self.log_load_per_expert = log_load_per_expert
        self._model: Any = None
        self._handles: list[RemovableHandle] = []
        self._training: _Totals | None = None
        self._evaluation: _Totals | None = None
        # The last forward in evaluation mode; it counts once Trainer says that it was a step of an evaluation.
        self._pending: _Totals | None = None
        self._warned: set[tuple[Stack, int, int]] = set()
        self._is_installed = False
        # What the last training log holds besides the averages.
        self._details: dict[str, float] = {}
        # What the last forward was asked for by this callback alone.
        self._added: set[str] = set()

    def install(self, trainer: Trainer) -> None:
        """
        Put this callback ahead of all others of `trainer`, so that TensorBoard, W&B and other reporters see what it
        adds to the logs, while the console shows averages only.

        Args:
            trainer: Any Trainer, given this callback before or not.

        Raises:
            ValueError: as when the Trainer is made with it, or if the Trainer has a `compute_loss_func`.
        """
        if trainer.compute_loss_func is not None and find_sparse_model(trainer.model) is not None:
            raise ValueError(
                "`compute_loss_func` takes the labels away from the model, which then computes no router losses and "
                "counts no experts. " + _OWN_LOSS
            )
        callbacks = trainer.callback_handler.callbacks
        is_new = self not in callbacks
        callbacks[:] = [self, *(c for c in callbacks if c is not self and not isinstance(c, _WithoutDetails))]
        consoles = [i for i, c in enumerate(callbacks) if isinstance(c, (PrinterCallback, ProgressCallback))]
        if consoles:
            callbacks.insert(consoles[0], _WithoutDetails(self))
        self._is_installed = True
        if is_new:
            self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def detach(self) -> None:
        """Remove the hooks from the model, which then returns only what its caller asks for."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work before anything is loaded or trained, and be ready for `trainer.evaluate()`."""
        self._attach(args, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, with the model that is trained: `model_init` may have made another."""
        self._attach(args, kwargs["model"])
        self._warned.clear()
        if self._model is not None and args.report_to and not self._is_installed:
            logger.warning(
                f"{' and '.join(args.report_to)} will not show what the routers do: Trainer calls reporters before "
                "SparseqCallback. Instead of `callbacks=[SparseqCallback()]` use `SparseqCallback().install(trainer)`."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the selection biases of a model that balances by them."""
        if self._model is not None and self._model.config.router_balancing == "loss_free":
            self._model.update_router_bias()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the forward with labels that this step made; generation makes none."""
        if self._pending is not None and self._evaluation is not None:
            self._evaluation.merge(self._pending)
        self._pending = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to a training log what happened since the last one, and to an evaluation's what it saw."""
        if logs is None or self._training is None or self._evaluation is None:
            return
        # Trainer has put a copy into its history already.
        is_last = bool(state.log_history) and logs.items() <= state.log_history[-1].items()
        if "loss" in logs:
            loads, averages = self._training.report()
            self._details = self._layer_metrics(loads) if self.log_layers else {}
            shown = {**averages, **self._details} if self._is_installed else averages
            stored = {**averages, **self._details}
            if state.is_world_process_zero:
                self._warn_of_dead_experts(loads)
        else:
            shown = stored = self._evaluation_metrics(logs)
        logs.update(shown)
        if is_last:
            state.log_history[-1].update(stored)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Add to the metrics of `trainer.predict`, which are not logged."""
        metrics.update(self._evaluation_metrics(metrics))
        if self._evaluation is not None:
            # Without labels nothing was reported.
            self._evaluation.reset()

    def _attach(self, args: TrainingArguments, model: nn.Module) -> None:
        self.detach()
        self._model = self._training = self._evaluation = self._pending = None
        found = find_sparse_model(model)
        if found is None:
            return
        refuse_label_smoothing(args)
        refuse_frozen_experts(model)
        if args.n_gpu > 1:
            # nn.DataParallel: what a replica counts is lost with it.
            if found.config.router_balancing == "loss_free":
                raise ValueError(
                    f'`router_balancing="loss_free"` cannot be trained by one process on {args.n_gpu} devices '
                    "(nn.DataParallel): the experts' counts would be lost. Start one process for each device, with "
                    "`accelerate launch` or `torchrun`."
                )
            logger.warning("SparseqCallback measures no routing under nn.DataParallel; use `accelerate launch`.")
            return
        self._model = found
        self._training, self._evaluation = _Totals(found), _Totals(found)
        self._handles = [
            found.register_forward_pre_hook(self._ask_for_routing, with_kwargs=True),
            found.register_forward_hook(self._read_routing, with_kwargs=True),
        ]

    def _ask_for_routing(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("labels") is not None:
            config: Any = module.config
            self._added = {name for name in _REQUESTS if not (kwargs.get(name) or getattr(config, name, False))}
            kwargs = {**kwargs, **dict.fromkeys(_REQUESTS, True)}
        elif module.training and torch.is_grad_enabled():
            logger.warning_once(
                "The model is trained without being given `labels`, so it computes no loss: router losses are "
                "missing, and no experts are counted or balanced. " + _OWN_LOSS
            )
        return args, kwargs

    @torch.compiler.disable
    @torch.no_grad()
    def _read_routing(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Checkpointed layers run again in the backward pass, the model as a whole does not: nothing counts twice.
        if kwargs.get("labels") is None or getattr(output, "loss", None) is None or self._training is None:
            return output
        if module.training:
            self._training.add(kwargs, output)
        else:
            self._pending = _Totals(module)
            self._pending.add(kwargs, output)
        # Nobody else gets what only this callback asked for; Trainer might take it for predictions.
        hidden = {f"{stack}_{name.removeprefix('output_')}" for stack in STACKS for name in self._added}
        if "output_router_logits" in self._added and not module.training:
            hidden.update(_ROUTER_LOSSES)
        return type(output)(**{name: value for name, value in output.items() if name not in hidden})

    def _evaluation_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What to add to the metrics of an evaluation; nothing if these are not an evaluation's."""
        # The summary of a training has a loss and a runtime as well.
        if self._evaluation is None or "total_flos" in metrics:
            return {}
        prefixes = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
        prefix = next((prefix for prefix in prefixes if f"{prefix}_loss" in metrics), None)
        if prefix is None:
            return {}
        _, averages = self._evaluation.report()
        return {f"{prefix}_{key}": value for key, value in averages.items()}

    def _layer_metrics(self, loads: Sequence[LayerLoad]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for entry in loads:
            name = f"router/{entry.stack}_{entry.layer}"
            metrics[f"{name}/max_vio"] = entry.max_violation
            metrics[f"{name}/dead_experts"] = len(entry.dead_experts)
            metrics[f"{name}/entropy"] = entry.router_entropy
            metrics[f"{name}/top1_probability"] = entry.mean_top1_probability
            if self.log_load_per_expert and len(entry.load) <= _MAX_LOADS:
                metrics |= {f"{name}/load_{expert}": share for expert, share in enumerate(entry.load)}
            else:
                metrics |= {f"{name}/min_load": min(entry.load), f"{name}/max_load": max(entry.load)}
        return metrics

    def _warn_of_dead_experts(self, loads: Sequence[LayerLoad]) -> None:
        """Warn of each expert once, until it has had tokens again."""
        config = self._model.config
        for entry in loads:
            dead = {(entry.stack, entry.layer, expert) for expert in entry.dead_experts}
            # Whoever has had a token since the last log is alive.
            self._warned -= {(entry.stack, entry.layer, e) for e in range(len(entry.load))} - dead
            if entry.tokens * config.num_experts_per_tok < _CHOICES_TO_JUDGE * len(entry.load):
                continue
            if new := sorted(expert for _, _, expert in dead - self._warned):
                experts = f"Expert {new[0]}" if len(new) == 1 else f"Experts {', '.join(map(str, new))}"
                logger.warning(
                    f"{experts} of {entry.stack} layer {entry.layer} got none of the last {entry.tokens:,} tokens: "
                    f"{_way_out(config)}"
                )
            self._warned |= dead


class _WithoutDetails(TrainerCallback):
    """Stands before the console in Trainer's list and takes the layers' metrics out of what it prints."""

    def __init__(self, owner: SparseqCallback) -> None:
        self.owner = owner

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave the averages; Trainer's history keeps everything."""
        for key in self.owner._details:
            if logs is not None:
                logs.pop(key, None)


class _Totals:
    """Sums over the forwards of one window: losses over label tokens, and routing."""

    def __init__(self, model: Any):
        self.model = model
        self.routing = {
            stack: RoutingTotals(len(model.config.sparse_layers(stack)), model.config.num_experts) for stack in STACKS
        }
        # Label tokens, the sum over them of the cross-entropy, and of each of `_ROUTER_LOSSES`.
        self.losses = torch.zeros(2 + len(_ROUTER_LOSSES))

    def add(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """Add one forward: its keyword arguments and its output."""
        labels = kwargs["labels"]
        losses = _loss_sums(self.model, labels, kwargs.get("num_items_in_batch"), output)
        self.losses = self.losses.to(losses) + losses
        is_real_target = real_targets(labels, kwargs.get("decoder_attention_mask"))
        for stack in STACKS:
            # Absent for an encoder whose output was given.
            logits = getattr(output, f"{stack}_router_logits", None)
            indices = getattr(output, f"{stack}_router_indices", None)
            if not logits or not indices:
                continue
            # The encoder marks padding itself; in evaluation the decoder runs all its tokens.
            is_real = is_real_target if stack == "decoder" else torch.ones_like(indices[0][:, 0], dtype=torch.bool)
            self.routing[stack].add(logits, indices, is_real, cheap_scores(self.model.routers(stack)[0]))

    def merge(self, other: "_Totals") -> None:
        """Add another window."""
        self.losses = self.losses.to(other.losses) + other.losses
        for stack, routing in self.routing.items():
            sums = other.routing[stack].sums()
            routing.load_sums(routing.sums().to(sums) + sums)

    def report(self) -> tuple[list[LayerLoad], dict[str, float]]:
        """
        Sum over all processes, which must all call this, and start anew.

        Returns:
            One entry for each sparse layer, and the averages by their name in the logs; none without a label.
        """
        self._sum_over_processes()
        tokens, *sums = self.losses.tolist()
        averages, loads = {}, []
        if tokens:
            names = ("cross_entropy", *_ROUTER_LOSSES)
            averages = {name: total / tokens for name, total in zip(names, sums, strict=True)}
        for stack, routing in self.routing.items():
            if routing.num_layers and routing.tokens.all():
                loads += routing.layer_loads(stack, self.model.config.sparse_layers(stack))
            else:
                averages = {name: value for name, value in averages.items() if not name.startswith(stack)}
        if loads:
            averages |= {
                "router/max_vio": sum(entry.max_violation for entry in loads) / len(loads),
                "router/dead_experts": sum(len(entry.dead_experts) for entry in loads),
                "router/entropy": sum(entry.router_entropy for entry in loads) / len(loads),
                "router/top1_probability": sum(entry.mean_top1_probability for entry in loads) / len(loads),
            }
        self.reset()
        return loads, averages

    def reset(self) -> None:
        """Start anew."""
        self.losses.zero_()
        for routing in self.routing.values():
            routing.reset()

    def _sum_over_processes(self) -> None:
        """One all_reduce, and one copy to the CPU, where the rest is cheap."""
        device = next(self.model.parameters()).device
        parts = [self.losses, *(routing.sums() for routing in self.routing.values())]
        # A process whose window is empty still has its totals on the CPU.
        vector = torch.cat([part.to(device=device, dtype=parts[-1].dtype) for part in parts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(vector)
        self.losses, *routing = vector.cpu().split([part.numel() for part in parts])
        for totals, sums in zip(self.routing.values(), routing, strict=True):
            totals.load_sums(sums)


def find_sparse_model(model: nn.Module | None) -> Any:
    """
    The sequence-to-sequence model with experts inside whatever wraps it (DDP, FSDP, PEFT, torch.compile), or None.

    It is known by what it has, not by its class: a model loaded as remote code has a class of its own.
    """
    for module in model.modules() if model is not None else ():
        # Looked up in the class, because wrappers hand out the attributes of what they wrap.
        if hasattr(type(module), "routers") and "lm_head" in module._modules:
            config: Any = module.config
            return module if config.num_experts > 0 else None
    return None


def refuse_label_smoothing(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: if Trainer is to smooth the labels itself.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` ({args.label_smoothing_factor}) would replace the model's loss and "
            "drop its router losses. Set `label_smoothing` in the model's configuration instead."
        )


def _loss_sums(model: Any, labels: torch.Tensor, num_items: torch.Tensor | int | None, output: Any) -> torch.Tensor:
    """Label tokens of a forward, the sum over them of its cross-entropy, and of each of its router losses."""
    loss = output.loss
    label_tokens = labels.ne(-100).sum().to(loss.device)
    router = [getattr(output, name, None) for name in _ROUTER_LOSSES]
    means = torch.stack([loss, *(torch.zeros_like(loss) if value is None else value for value in router)])
    if model.training:
        balance_coef, z_coef = model.router_loss_coefs
        means[0] -= balance_coef * (means[1] + means[2]) + z_coef * (means[3] + means[4])
    # The model has divided by the label tokens of the whole optimizer step, where it was told them.
    sums = means * (label_tokens if num_items is None else num_items)
    sums = torch.cat([label_tokens[None].to(sums.dtype), sums])
    return sums if loss.device.type == "mps" else sums.double()


def _way_out(config: Any) -> str:
    if config.router_balancing == "aux_loss":
        return f'raise `router_aux_loss_coef` ({config.router_aux_loss_coef}), or balance with "loss_free"'
    if config.router_balancing == "loss_free":
        return f'raise `router_bias_update_rate` ({config.router_bias_update_rate}), or balance with "aux_loss"'
    return 'set `router_balancing` to "aux_loss" or "loss_free" (it is "none")'
