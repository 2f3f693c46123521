# Copyright 2026 The Sparseq authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Sparseq: everything that decides the architecture, and nothing that belongs to generation."""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

# `sparseq.__version__`, which the copy of this file in a model's folder cannot ask for.
SPARSEQ_VERSION = "0.1.0"
# What the fields and the weights mean. Raised when a field changes its meaning, or a weight its name, shape or order,
# so that earlier versions refuse what they would misread; `from_dict` must then translate what they have written.
FORMAT_VERSION = 1
_FIRST_RELEASE = "0.1.0"
# Of the library, in no class attribute of `PreTrainedConfig`.
_LIBRARY_FIELDS = ("auto_map", "tokenizer_class", "quantization_config")


@strict
class SparseqConfig(PreTrainedConfig):
    r"""
    Configuration of a Sparseq encoder-decoder Transformer (Vaswani et al. 2017, arXiv 1706.03762) with grouped-query
    attention (arXiv 2305.13245) and dropless mixture-of-experts feed-forward layers.

    The defaults describe a modern sparse model of about base size. All checks run when the object is made; each error
    names the fields and their values.

    Args:
        vocab_size: Number of tokens of the joint vocabulary.
        d_model: Width of the hidden states.
        encoder_layers, decoder_layers: Number of layers of each stack.
        encoder_attention_heads, decoder_attention_heads: Query heads; they must divide `d_model`.
        encoder_num_key_value_heads, decoder_num_key_value_heads: Key-value heads, which must divide the query heads:
            1 is multi-query attention, `None` as many as query heads (multi-head). The decoder's number holds for
            its self-attention and its cross-attention.
        encoder_ffn_dim, decoder_ffn_dim: Inner width of the dense feed-forward layers.
        activation_function: A name that `transformers.activations.ACT2FN` knows.
        gated_ffn: `down(act(gate(x)) * up(x))` (arXiv 2002.05202) instead of `down(act(up(x)))`.
        dropout: Probability of dropping an element of an embedding or of a sub-layer's output.
        attention_dropout: Probability of dropping an attention weight.
        activation_dropout: Probability of dropping an element of a dense feed-forward layer's inner activation.
        position_embedding_type: "sinusoidal" (any length, no parameters), "learned" (at most
            `max_position_embeddings` tokens), "rotary" (in self-attention only, arXiv 2104.09864) or "none".
        max_position_embeddings: Rows of the learned tables; with other kinds only the length a user should expect
            the model to handle. `None` states no length.
        position_offset: Added to every position before the look-up or the sinusoid (BART 2, M2M100 2).
        sinusoidal_layout: "interleaved" sine and cosine as the 2017 paper has it, or all sines then all cosines in two
            "halves" (Marian, M2M100).
        sinusoidal_spacing: Exponents of the frequencies: "paper" 2i/d, or "tensor2tensor" i/(d/2 - 1) (fairseq,
            M2M100), where the last frequency is exactly 1/10000.
        rope_parameters: `{"rope_type": "default" | "linear", "rope_theta": float, "factor": float}` for "rotary".
        norm_type: "layernorm" or "rmsnorm".
        norm_position: "pre" normalises a sub-layer's input, "post" its residual sum (2017).
        norm_eps: Added to the variance (LayerNorm) or the mean square (RMSNorm).
        embedding_norm: Normalise the embeddings of each stack (BART).
        final_norm: Normalise each stack's output. `None` means: with `norm_position="pre"`.
        scale_embedding: Multiply token embeddings by sqrt(d_model) (2017 paper, section 3.4).
        tie_word_embeddings: The output projection is the decoder's embedding.
        share_encoder_decoder_embeddings: Both stacks read one embedding.
        attention_bias: Biases in the query, key, value and output projections.
        ffn_bias: Biases in dense feed-forward layers and shared experts.
        expert_bias: Biases in the routed experts.
        final_logits_bias: A buffer added to the logits (Marian, BART).
        num_experts: Routed experts of each sparse layer. 0 makes the whole model dense.
        num_experts_per_tok: Experts that each token is sent to (top-k).
        encoder_sparse_step, decoder_sparse_step: Layer i is sparse where `(i + 1) % step == 0`; 0 keeps the stack
            dense.
        expert_ffn_dim: Inner width of one expert. `None` means `encoder_ffn_dim // num_experts_per_tok`, which gives
            a sparse layer the active parameters of a dense one.
        num_shared_experts: Experts that every token passes through besides its routed ones (arXiv 2401.06066);
            computed as one feed-forward layer of `num_shared_experts * expert_ffn_dim`.
        router_scoring: "softmax" or "sigmoid" of the router logits.
        norm_topk_prob: Divide the chosen experts' scores by their sum.
        router_jitter_noise: In training the router sees its input multiplied by uniform noise in [1 - x, 1 + x]
            (arXiv 2101.03961, section 2.2); the experts see it as it is.
        expert_dropout: `activation_dropout` of the routed experts; few tokens train each of them, so on small data
            they bear more (arXiv 2101.03961, section 2.4). `None` means `activation_dropout`.
        expert_output_masking: Probability, in training, of leaving out one chosen expert of one token, the others
            being scaled up by 1 / (1 - x) (arXiv 2212.07571). What is left out is not computed.
        router_balancing: "aux_loss" (Switch, arXiv 2101.03961), "loss_free" (a selection bias, arXiv 2408.15664; it is
            moved by `update_router_bias()`, once an optimizer step) or "none".
        router_balancing_scope: The auxiliary loss balances each "sequence" (additive over sentences, so the same under
            gradient accumulation and many devices) or the micro-"batch".
        router_aux_loss_coef: Weight of the load-balancing loss of each stack (mean over its sparse layers).
        router_z_loss_coef: Weight of the router z-loss (arXiv 2202.08906), likewise.
        router_bias_update_rate: Step of the selection bias, u of arXiv 2408.15664.
        label_smoothing: Probability mass that training targets spread over the vocabulary. Evaluation has none.
        initializer_range: Standard deviation of normal initial weights. `None` means Xavier uniform for projections
            and d_model^-0.5 for embeddings, which learns from scratch where 0.02 may not.
        pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: Special tokens.
        use_cache: Return key-value caches from the decoder unless the caller says otherwise.
        output_router_logits: Return router logits unless the caller says otherwise.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a field of a wrong type, a value out of range, or fields that
            contradict each other.
        ValueError: for what a newer Sparseq has written and this one would misread.

    Example:

    ```python
    >>> from sparseq import SparseqConfig
    >>> config = SparseqConfig(d_model=256, encoder_attention_heads=4, decoder_attention_heads=4, num_experts=8)
    >>> config.num_parameters() > config.num_parameters(active=True)
    True

    ```
    """

    model_type = "sparseq"
    # A configuration saved by itself brings its code along, as a model does.
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_router_logits",
        "decoder_router_logits",
        "encoder_router_indices",
        "decoder_router_indices",
        "encoder_aux_loss",
        "decoder_aux_loss",
        "encoder_z_loss",
        "decoder_z_loss",
    ]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "num_local_experts": "num_experts",
    }
    # The library would apply a plan given here to the root, the encoder and the decoder alike, and fail on the first.
    base_model_fsdp_plan = {}

    vocab_size: int = 32_000
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_num_key_value_heads: int | None = 4
    decoder_num_key_value_heads: int | None = 4
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536
    activation_function: str = "silu"
    gated_ffn: bool = True
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0

    position_embedding_type: Literal["sinusoidal", "learned", "rotary", "none"] = "rotary"
    max_position_embeddings: int | None = 1024
    position_offset: int = 0
    sinusoidal_layout: Literal["interleaved", "halves"] = "interleaved"
    sinusoidal_spacing: Literal["paper", "tensor2tensor"] = "paper"
    rope_parameters: dict[str, Any] | None = None

    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    final_norm: bool | None = None
    scale_embedding: bool = True
    tie_word_embeddings: bool = True
    share_encoder_decoder_embeddings: bool = True
    attention_bias: bool = False
    ffn_bias: bool = False
    expert_bias: bool = False
    final_logits_bias: bool = False

    num_experts: int = 8
    num_experts_per_tok: int = 2
    encoder_sparse_step: int = 2
    decoder_sparse_step: int = 2
    expert_ffn_dim: int | None = None
    num_shared_experts: int = 0
    router_scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    router_jitter_noise: float | int = 0.0
    expert_dropout: float | int | None = None
    expert_output_masking: float | int = 0.0
    router_balancing: Literal["aux_loss", "loss_free", "none"] = "aux_loss"
    router_balancing_scope: Literal["sequence", "batch"] = "sequence"
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    router_bias_update_rate: float | int = 0.001

    label_smoothing: float | int = 0.0
    initializer_range: float | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int = 1
    is_encoder_decoder: bool = True
    use_cache: bool = True
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _check_written_by({name: kwargs.pop(name) for name in ("format_version", "sparseq_version") if name in kwargs})
        if self.encoder_num_key_value_heads is None:
            self.encoder_num_key_value_heads = self.encoder_attention_heads
        if self.decoder_num_key_value_heads is None:
            self.decoder_num_key_value_heads = self.decoder_attention_heads
        if self.final_norm is None:
            self.final_norm = self.norm_position == "pre"
        if self.expert_ffn_dim is None:
            self.expert_ffn_dim = max(1, self.encoder_ffn_dim // max(1, self.num_experts_per_tok))
        super().__post_init__(**kwargs)

    @property
    def format_version(self) -> int:
        """Version of the format that this configuration is saved in. One that was loaded is of the present format."""
        return FORMAT_VERSION

    @property
    def sparseq_version(self) -> str:
        """Version of Sparseq that this configuration is saved by, for messages."""
        return SPARSEQ_VERSION

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `format_version` and `sparseq_version`, as plain values."""
        versions = {name: getattr(self, name) for name in ("format_version", "sparseq_version")}
        return {**super().to_dict(), **versions}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As the library's, for what this version of Sparseq or an earlier one has written.

        Raises:
            ValueError: if a newer version has written it, in a later format, with fields that this one does not know
                or values that it does not take. The message names both versions and the way out.
        """
        where = str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "")
        newer = _check_written_by(config_dict, where)
        known = {*cls.attribute_map, *_LIBRARY_FIELDS}
        unknown = sorted(
            name for name in config_dict if not (hasattr(cls, name) or name in known or name.startswith("_"))
        )
        if newer and unknown:
            raise ValueError(_needs_newer(config_dict, where, f"has fields unknown here ({', '.join(unknown)})"))
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            if not newer:
                raise
            reason = "has values unknown here (" + str(error).splitlines()[-1].strip() + ")"
            raise ValueError(_needs_newer(config_dict, where, reason)) from error

    def sparse_layers(self, stack: Literal["encoder", "decoder"]) -> list[int]:
        """Indices of the layers of `stack` whose feed-forward is a mixture of experts."""
        step = self.encoder_sparse_step if stack == "encoder" else self.decoder_sparse_step
        layers = self.encoder_layers if stack == "encoder" else self.decoder_layers
        if self.num_experts == 0 or step == 0:
            return []
        return [i for i in range(layers) if (i + 1) % step == 0]

    def num_parameters(self, active: bool = False) -> int:
        """
        Parameters of `SparseqForConditionalGeneration` with this configuration, tied ones counted once.

        Args:
            active: Count only what one token uses: of each sparse layer's experts, `num_experts_per_tok`. Embeddings
                count whole, as is usual.
        """
        tables = 1 + (not self.share_encoder_decoder_embeddings) + (not self.tie_word_embeddings)
        total = tables * self.vocab_size * self.d_model
        for stack in ("encoder", "decoder"):
            total += self._num_stack_parameters(stack, active)
        return total

    def _num_stack_parameters(self, stack: Literal["encoder", "decoder"], active: bool) -> int:
        d = self.d_model
        is_encoder = stack == "encoder"
        layers = self.encoder_layers if is_encoder else self.decoder_layers
        heads = self.encoder_attention_heads if is_encoder else self.decoder_attention_heads
        kv_heads = self.encoder_num_key_value_heads if is_encoder else self.decoder_num_key_value_heads
        ffn_dim = self.encoder_ffn_dim if is_encoder else self.decoder_ffn_dim
        attentions = 1 if is_encoder else 2
        norm = d * (2 if self.norm_type == "layernorm" else 1)
        kv_dim = d // heads * kv_heads
        attention = 2 * d * d + 2 * d * kv_dim + self.attention_bias * (2 * d + 2 * kv_dim)

        def feed_forward(width: int, bias: bool) -> int:
            inner = width * (2 if self.gated_ffn else 1)
            return d * (inner + width) + bias * (inner + d)

        sparse_layers = len(self.sparse_layers(stack))
        experts = self.num_experts_per_tok if active else self.num_experts
        sparse = self.num_experts * d + experts * feed_forward(self.expert_ffn_dim, self.expert_bias)
        if self.num_shared_experts:
            sparse += feed_forward(self.num_shared_experts * self.expert_ffn_dim, self.ffn_bias)
        total = layers * (attentions * (attention + norm) + norm)
        total += (layers - sparse_layers) * feed_forward(ffn_dim, self.ffn_bias) + sparse_layers * sparse
        total += (self.embedding_norm + self.final_norm) * norm
        if self.position_embedding_type == "learned":
            total += (self.max_position_embeddings + self.position_offset) * d
        return total

    def validate_architecture(self) -> None:
        """Refuse values out of range and fields that contradict each other; run when the object is made."""
        self._check_sizes()
        self._check_attention()
        self._check_positions()
        self._check_experts()
        self._check_tokens()
        self._check_activation()

    def _check_sizes(self) -> None:
        at_least_one = ["vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads"]
        at_least_one += ["decoder_attention_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"]
        at_least_one += ["encoder_ffn_dim", "decoder_ffn_dim", "expert_ffn_dim", "num_experts_per_tok"]
        not_negative = ["num_experts", "encoder_sparse_step", "decoder_sparse_step", "num_shared_experts"]
        not_negative += ["position_offset", "router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"]
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` must be True: Sparseq has no decoder-only form, but it is False")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}")
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, but is {getattr(self, name)}")
        probabilities = ["dropout", "attention_dropout", "activation_dropout", "expert_dropout", "label_smoothing"]
        for name in [*probabilities, "router_jitter_noise", "expert_output_masking"]:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, but is {value}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, but is {value}")
        if self.norm_eps <= 0:
            raise ValueError(f"`norm_eps` must be above 0, but is {self.norm_eps}")
        if self.initializer_range is not None and self.initializer_range <= 0:
            raise ValueError(f"`initializer_range` must be above 0 or None, but is {self.initializer_range}")

    def _check_attention(self) -> None:
        for stack in ("encoder", "decoder"):
            heads = getattr(self, f"{stack}_attention_heads")
            kv_heads = getattr(self, f"{stack}_num_key_value_heads")
            if self.d_model % heads:
                raise ValueError(
                    f"`d_model` must be a multiple of `{stack}_attention_heads` ({heads}), but is {self.d_model}"
                )
            if heads % kv_heads:
                raise ValueError(
                    f"`{stack}_attention_heads` must be a multiple of `{stack}_num_key_value_heads` ({kv_heads}), "
                    f"but is {heads}; pass `{stack}_num_key_value_heads=None` for multi-head attention"
                )

    def _check_positions(self) -> None:
        kind = self.position_embedding_type
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise ValueError(
                f"`max_position_embeddings` must be at least 1 or None, but is {self.max_position_embeddings}"
            )
        if kind == "learned" and self.max_position_embeddings is None:
            raise ValueError(
                '`position_embedding_type="learned"` needs `max_position_embeddings`, the number of positions to '
                "learn, but it is None"
            )
        if kind == "sinusoidal":
            if self.d_model % 2:
                raise ValueError(
                    f'`position_embedding_type="sinusoidal"` pairs sines with cosines, so `d_model` must be even, but '
                    f"is {self.d_model}"
                )
            if self.sinusoidal_spacing == "tensor2tensor" and self.d_model < 4:
                raise ValueError(
                    f'`sinusoidal_spacing="tensor2tensor"` needs a `d_model` of at least 4, but it is {self.d_model}'
                )
        if kind == "rotary":
            self._check_rotary()

    def _check_rotary(self) -> None:
        for stack in ("encoder", "decoder"):
            heads = getattr(self, f"{stack}_attention_heads")
            if (self.d_model // heads) % 2:
                raise ValueError(
                    f'`position_embedding_type="rotary"` rotates pairs, so `d_model / {stack}_attention_heads` must '
                    f"be even, but {self.d_model} / {heads} is {self.d_model // heads}"
                )
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ("default", "linear"):
            raise ValueError(f'`rope_parameters["rope_type"]` must be "default" or "linear", but is "{rope_type}"')
        limits = {"rope_theta": 0} | ({"factor": 1} if rope_type == "linear" else {})
        for name, limit in limits.items():
            value = self.rope_parameters.get(name)
            if not isinstance(value, Real) or not math.isfinite(value) or value < limit or value == 0:
                bound = "above 0" if limit == 0 else f'at least {limit} for rope_type "{rope_type}"'
                raise ValueError(f'`rope_parameters["{name}"]` must be a number {bound}, but is {value!r}')

    def _check_experts(self) -> None:
        if self.num_experts == 0:
            if self.num_shared_experts:
                raise ValueError(
                    f"`num_shared_experts` ({self.num_shared_experts}) needs routed experts beside it, but "
                    "`num_experts` is 0"
                )
            return
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be at most `num_experts` ({self.num_experts}), but is "
                f"{self.num_experts_per_tok}"
            )
        if not self.sparse_layers("encoder") and not self.sparse_layers("decoder"):
            raise ValueError(
                f"`num_experts` is {self.num_experts}, but no layer is sparse: `encoder_sparse_step` "
                f"({self.encoder_sparse_step}) and `decoder_sparse_step` ({self.decoder_sparse_step}) reach none of "
                f"{self.encoder_layers} and {self.decoder_layers} layers; set a step of at most the number of layers, "
                "or `num_experts=0` for a dense model"
            )
        if self.norm_topk_prob and self.num_experts_per_tok == 1 and self.num_experts > 1:
            raise ValueError(
                "`norm_topk_prob=True` with `num_experts_per_tok=1` makes every routing weight 1, so the router would "
                "get no gradient; set `norm_topk_prob=False`"
            )

    def check_parallelism(self, distributed_config: "DistributedConfig") -> None:
        """
        Refuse a way of cutting the model that its sizes do not allow. `from_pretrained(distributed_config=...)` calls
        it before weights are read; it needs no processes, so it can be asked anywhere.

        Args:
            distributed_config: How the model is to be cut.

        Raises:
            ValueError: names the field, the number of processes and the way out.
        """
        if distributed_config.pp_size > 1:
            raise ValueError(
                f"`pp_size` ({distributed_config.pp_size}) asks for pipeline parallelism, which Sparseq has no plan "
                "for; use `tp_size`, `ep_size` or `fsdp_size`"
            )
        has_experts = bool(self.sparse_layers("encoder") or self.sparse_layers("decoder"))
        if distributed_config.ep_size > 1:
            self._check_expert_parallelism(distributed_config.ep_size, distributed_config.tp_size, has_experts)
        if distributed_config.tp_size > 1:
            has_cut_experts = has_experts and distributed_config.ep_size == 1
            self._check_tensor_parallelism(distributed_config.tp_size, has_cut_experts)

    def _check_tensor_parallelism(self, tp_size: int, has_cut_experts: bool) -> None:
        names = [
            f"{stack}_{part}_heads" for stack in ("encoder", "decoder") for part in ("attention", "num_key_value")
        ]
        # Widths that some layer has.
        names += ["encoder_ffn_dim"] if len(self.sparse_layers("encoder")) < self.encoder_layers else []
        names += ["decoder_ffn_dim"] if len(self.sparse_layers("decoder")) < self.decoder_layers else []
        if has_cut_experts or self.num_shared_experts * self.expert_ffn_dim % tp_size:
            names.append("expert_ffn_dim")
        for name in names:
            if getattr(self, name) % tp_size:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must be a multiple of `tp_size` ({tp_size}), because tensor "
                    "parallelism gives each process an equal part; use a `tp_size` that divides it, or in its place "
                    "`fsdp_size`, which cuts any size and goes with `ep_size` as well"
                )
        if has_cut_experts and self.expert_bias:
            raise ValueError(
                f"`expert_bias=True` has no plan for `tp_size` ({tp_size}) alone: the library cannot cut the experts' "
                f"biases as it cuts their weights; add `ep_size={tp_size}`, which gives each process whole experts, "
                "or use `fsdp_size`"
            )

    def _check_expert_parallelism(self, ep_size: int, tp_size: int, has_experts: bool) -> None:
        if not has_experts:
            raise ValueError(
                f"`ep_size` ({ep_size}) shares out experts, but the model has none (`num_experts` is "
                f"{self.num_experts}); use `tp_size` or `fsdp_size`"
            )
        if self.num_experts % ep_size:
            raise ValueError(
                f"`num_experts` ({self.num_experts}) must be a multiple of `ep_size` ({ep_size}), because each "
                "process gets as many experts; use an `ep_size` that divides it, or `fsdp_size` alone, which cuts any "
                "number"
            )
        name = "activation_dropout" if self.expert_dropout is None else "expert_dropout"
        if tp_size > 1 and getattr(self, name):
            raise ValueError(
                f"`{name}` ({getattr(self, name)}) acts in the experts, where with `tp_size` ({tp_size}) and "
                f"`ep_size` ({ep_size}) each process has other rows. It would draw another number of random numbers, "
                "and every later dropout would differ between processes that must agree. Load with "
                "`expert_dropout=0.0`, which changes nothing in inference, or use `fsdp_size` in place of `tp_size`"
            )

    def _check_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"`{name}` must be in [0, `vocab_size` ({self.vocab_size})), but is {token}")

    def _check_activation(self) -> None:
        # Imported here because it brings torch, which reading a configuration does not need.
        from transformers.activations import ACT2FN

        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"`activation_function` must be one of {sorted(ACT2FN)}, but is '{self.activation_function}'"
            )
        if any(True for _ in ACT2FN[self.activation_function].parameters()):
            raise ValueError(
                f"`activation_function` '{self.activation_function}' has parameters of its own, which stacked experts "
                "cannot hold; choose one without, such as 'relu', 'gelu' or 'silu'"
            )


def _check_written_by(fields: Mapping[str, Any], where: str = "") -> bool:
    """
    Check `format_version` and `sparseq_version`, where `fields` has them; returns whether a newer Sparseq wrote them.

    Raises:
        ValueError: if one is no version, or the format is a later one.
    """
    # Written before there were these fields.
    written, version = fields.get("format_version", 1), fields.get("sparseq_version", _FIRST_RELEASE)
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise ValueError(f"`format_version` must be a whole number of at least 1, but is {written!r}")
    if not isinstance(version, str) or _release(version) is None:
        raise ValueError(f'`sparseq_version` must be a version such as "{SPARSEQ_VERSION}", but is {version!r}')
    if written > FORMAT_VERSION:
        raise ValueError(_needs_newer(fields, where, f"is in format {written}"))
    return _release(version) > _release(SPARSEQ_VERSION)


def _release(version: str) -> tuple[int, int, int] | None:
    """The numbers of a version; what may follow them, as in "1.0.0rc1", does not count."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:[.a-z+-][\w.+]*)?", version)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _needs_newer(fields: Mapping[str, Any], where: str, reason: str) -> str:
    by = f"Sparseq {fields['sparseq_version']}" if "sparseq_version" in fields else "a newer Sparseq"
    facts = (
        f"{where or 'This configuration'} {reason}, written by {by}, but this is Sparseq {SPARSEQ_VERSION}, which "
        f"reads formats up to {FORMAT_VERSION}. "
    )
    if __name__.partition(".")[0] == "sparseq":
        return facts + (
            "Update it: `pip install -U sparseq`. Or run the code that came with the model: in a process that does "
            "not import sparseq, load with `trust_remote_code=True`."
        )
    return facts + (
        "The code beside a configuration must be of the same version: load both at one revision (`code_revision` may "
        "name another), or `pip install -U sparseq` and import it."
    )


__all__ = ["SparseqConfig"]
