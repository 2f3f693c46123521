# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""
Int8 weights for inference, also of stacked experts: `from_pretrained(..., quantization_config=SparseqInt8Config())`.

Every weight of a projection, an expert or an embedding is kept as int8 with one scale for each output channel, and
becomes floating point again when it is used. On the CPU only the experts that a batch has chosen do. Shapes are named
as in modeling_sparseq.py; O is the outputs and I the inputs of a weight.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

INT8_METHOD = "sparseq_int8"
"""`quant_method` in the config.json of a model that was saved with int8 weights."""

# The floating-point copy of a larger weight does not stay in the CPU's caches between being written and being read,
# and is made piece by piece: this many numbers at a time, which is 1 MB.
_LARGE_WEIGHT, _PIECE = 2**20, 2**18


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Symmetric int8 numbers of the same shape as `weight` `(..., O, I)`, and the scales `(..., O)` to multiply them
    with, in its type: the largest number of a row becomes 127 or -127.

    Raises:
        ValueError: if a number is not finite.
    """
    rows = weight.float()
    scale = (rows.abs().amax(dim=-1) / 127).to(weight.dtype)
    if not scale.isfinite().all():
        raise ValueError("A weight that is not finite has no int8 form")
    # By the scale as it is kept, so that its rounding to a short type is made up for; a row of zeros stays one.
    rows = rows / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return rows.round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What `quantize_rows` gave, `(..., O, I)` and `(..., O)`, as floating point in the type of the scales."""
    return weight.to(scale.dtype).mul_(scale[..., None])


def _make_room(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Give `module` the parameters `name` and `name`_scale that hold `weight`, uninitialised."""
    int8 = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(weight.shape[:-1], dtype=weight.dtype, device=weight.device)
    module.register_parameter(name, nn.Parameter(int8, requires_grad=False))
    module.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))


class Int8Linear(nn.Module):
    """The linear map of an `nn.Linear`, with int8 weights that are to be loaded."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        _make_room(self, "weight", linear.weight)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `(..., I)` to `(..., O)`."""
        if self.weight.numel() <= _LARGE_WEIGHT or self.weight.device.type != "cpu":
            return F.linear(inputs, dequantize_rows(self.weight, self.weight_scale), self.bias)
        rows = max(_PIECE // self.in_features, 1)
        pieces = zip(self.weight.split(rows), self.weight_scale.split(rows), strict=True)
        outputs = torch.cat([F.linear(inputs, dequantize_rows(*piece)) for piece in pieces], dim=-1)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """The vectors of an `nn.Embedding`, with int8 weights that are to be loaded."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        _make_room(self, "weight", embedding.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids `(...)` to vectors `(..., H)`."""
        return dequantize_rows(self.weight[ids], self.weight_scale[ids])

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Experts(nn.Module):
    """Stacked experts with int8 weights that are to be loaded; biases stay as they are."""

    down_proj: torch.Tensor
    down_proj_scale: torch.Tensor

    def __init__(self, experts: Any):
        super().__init__()
        self.num_experts: int = experts.num_experts
        self.has_gate: bool = experts.has_gate
        self.has_bias: bool = experts.has_bias
        self.act_fn: nn.Module = experts.act_fn
        self.first = "gate_up_proj" if self.has_gate else "up_proj"
        for name in (self.first, "down_proj"):
            _make_room(self, name, getattr(experts, name))
            if self.has_bias:
                self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias"))

    def stacked_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Weights and biases of all experts in floating point, as `SparseqExperts.stacked_parameters` has them."""
        first, second = (
            dequantize_rows(getattr(self, name), getattr(self, f"{name}_scale")) for name in (self.first, "down_proj")
        )
        return first, getattr(self, f"{self.first}_bias", None), second, getattr(self, "down_proj_bias", None)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(up, gate)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(N, H)`.
            top_k_index: `(N, K)`, E for padding.
            top_k_weights: `(N, K)`.

        Returns:
            `(N, H)`.

        Raises:
            ValueError: with an adapter of PEFT, whose updates would be cut to whole numbers.
        """
        if "parametrizations" in self._modules:
            raise ValueError(
                "Int8 experts take no adapters: train them on the model in floating point, merge them there, and make "
                "int8 weights of the result"
            )
        if hidden_states.device.type != "cpu" or is_tracing(hidden_states):
            # Which experts were chosen is not known without waiting for the device, or breaking the graph.
            return ALL_EXPERTS_FUNCTIONS["sparseq"](self, hidden_states, top_k_index, top_k_weights)
        tokens, top_k = top_k_index.shape
        ids, order = top_k_index.flatten().sort(stable=True)
        sizes = ids.bincount(minlength=self.num_experts + 1).tolist()
        inputs = hidden_states[order // top_k]
        # Rows of padding, the last ones, stay zero.
        sorted_outputs = torch.zeros_like(inputs)
        start = 0
        for expert, size in enumerate(sizes[:-1]):
            if size:
                sorted_outputs[start : start + size] = self._run(expert, inputs[start : start + size])
                start += size
        outputs = torch.empty_like(sorted_outputs)
        outputs[order] = sorted_outputs
        outputs = outputs.view(tokens, top_k, -1) * top_k_weights[..., None]
        return outputs.sum(dim=1).to(hidden_states.dtype)

    def _run(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """One expert's outputs for `rows` `(M, H)`."""
        inner = self._project(self.first, expert, rows)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return self._project("down_proj", expert, inner)

    def _project(self, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        weight = dequantize_rows(getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert])
        return F.linear(rows, weight, getattr(self, f"{name}_bias")[expert] if self.has_bias else None)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.first}={tuple(getattr(self, self.first).shape)}"


class SparseqInt8Config(QuantizationConfigMixin):
    """
    Asks `from_pretrained` for int8 weights: those of all projections, experts, token embeddings and the output
    projection, with one scale for each output channel. Norms, routers, biases and positions stay as they are.
    """

    def __init__(self, quant_method: str = INT8_METHOD):
        if quant_method != INT8_METHOD:
            raise ValueError(
                f"`quant_method` of a SparseqInt8Config is {INT8_METHOD!r}, but {quant_method!r} was given"
            )
        self.quant_method = INT8_METHOD  # type: ignore[assignment]  # typed as the library's own methods


class SparseqInt8Quantizer(HfQuantizer):
    """Makes room for int8 weights in a model before it is loaded, and fills it from int8 or floating-point files."""

    quantized_element_size = 1

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if model.config.model_type != "sparseq":
            raise ValueError(
                f"SparseqInt8Config is for models of type 'sparseq', but this one is {model.config.model_type!r}"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "Int8 weights cannot be distributed: load the model without `distributed_config`, or without "
                "`quantization_config`"
            )
        use_int8_modules(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return f"{name}_scale" in module._parameters

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeRows()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def warn_of_floating_experts(config: Any) -> None:
    """Warn where a sparse model of this `SparseqConfig` is to be quantized by others, who know `nn.Linear` only."""
    settings = getattr(config, "quantization_config", None)
    if settings is None or not config.num_experts:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    if method != INT8_METHOD:
        logger.warning_once(
            f"`quantization_config` asks for {getattr(method, 'value', method)!r}, which may leave the weights of "
            f"{config.num_experts} experts, most of the model, in floating point: see `model.get_memory_footprint()`. "
            "`SparseqInt8Config()` reaches them."
        )


def use_int8_modules(model: PreTrainedModel) -> None:
    """Put modules with room for int8 weights in the place of a model's linear maps, embeddings and experts."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            kind: Any = None
            if type(module) is nn.Linear:
                kind = Int8Linear
            elif type(module) is nn.Embedding:
                kind = Int8Embedding
            elif hasattr(module, "stacked_parameters") and not isinstance(module, Int8Experts):
                kind = Int8Experts
            if kind is not None:
                # Both stacks hold one embedding, and go on doing so.
                setattr(parent, name, made.setdefault(module, kind(module)))
    tied = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        tied[f"{target}_scale"] = f"{source}_scale"
    # What tie_weights() starts from when it is called again.
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._tied_weights_keys:
            keys = dict(module._tied_weights_keys)
            module._tied_weights_keys = keys | {
                f"{target}_scale": f"{source}_scale" for target, source in keys.items()
            }


class _QuantizeRows(ConversionOps):
    """Makes two tensors of a weight while it is loaded."""

    def convert(  # type: ignore[override]  # the library passes everything by name
        self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (weight,) = input_dict.values()
        int8, scale = quantize_rows(weight[0] if isinstance(weight, list) else weight)
        return {full_layer_name: int8, f"{full_layer_name}_scale": scale}


# A model's folder may bring a copy of this file; the first to be imported serves both.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(INT8_METHOD, SparseqInt8Config)
AUTO_QUANTIZER_MAPPING.setdefault(INT8_METHOD, SparseqInt8Quantizer)
