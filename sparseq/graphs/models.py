"""The graphs of a Sparseq model: encoder, prefill and decode step."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
from onnx import TensorProto

from ..configuration_sparseq import SparseqConfig
from ..modeling_sparseq import SparseqDecoderLayer, SparseqEncoderLayer, SparseqForConditionalGeneration
from .activations import check_activation
from .attention import Shape, SourceAttention, TargetAttention
from .experts import feed_forward
from .heads import head_rows
from .layers import Layers, Projection, array_of, parameters_of
from .nodes import Graph, WeightFile
from .operators import Operators
from .positions import position_vectors, rotary_tables

# Tokens that `ModelGraphs.likeliest` looks at together.
_GROUP = 32

Stack = Literal["encoder", "decoder"]


class ModelGraphs:
    """Builds the graphs of one model.

    Args:
        model: The model; its weights are read as they are asked for, in float32.
        weights: Where they go.
        operators: What they are computed with.

    Raises:
        ValueError: The model has an activation that no graph can express.
    """

    def __init__(self, model: SparseqForConditionalGeneration, weights: WeightFile, operators: Operators):
        check_activation(model.config.activation_function)
        self.model = model
        self.config: SparseqConfig = model.config
        self.weights = weights
        self.operators = operators

    def encoder(self) -> Graph:
        """Source tokens to what the decoder needs of them, computed once a source.

        Inputs `input_ids` and `attention_mask` `(B, S)` int64. Outputs `source_mask` `(B, S)` int32 and, for each
        decoder layer, `cross_key_i` and `cross_value_i` `(B, K, S, P)`.
        """
        graph = Graph("encoder", self.weights)
        layers = Layers(graph, self.config, self.operators)
        ids = graph.input("input_ids", "int64", ["B", "S"])
        given_mask = graph.input("attention_mask", "int64", ["B", "S"])
        mask = graph.node("Cast", given_mask, to=TensorProto.INT32)
        graph.output(mask, "source_mask", "int32", ["B", "S"])
        attention = SourceAttention(layers, mask)

        # Positions count real tokens.
        counted = graph.node("Sub", graph.node("CumSum", given_mask, graph.constant(1)), graph.constant(1))
        positions = graph.node("Max", counted, graph.constant(0))
        places = _range(graph, graph.node("Shape", ids, start=1, end=2))
        encoder = self.model.model.encoder
        flat = graph.node("Reshape", positions, graph.constant([-1]))
        states = self._embed(layers, "encoder", graph.node("Reshape", ids, graph.constant([-1])), places, flat)
        rotary = None if encoder.rotary is None else rotary_tables(graph, encoder.rotary, places, positions)
        for index, layer in enumerate(cast(Iterable[SparseqEncoderLayer], encoder.layers)):
            name = f"encoder.layers.{index}"
            norm = f"{name}.self_attn_layer_norm", layer.self_attn_layer_norm
            output = attention.encode(layers.enter(states, *norm), f"{name}.self_attn", layer.self_attn, rotary)
            states = self._feed_forward(layers, layers.leave(states, output, *norm), name, layer)
        if encoder.norm is not None:
            states = layers.norm(states, "encoder.norm", encoder.norm)
        self._write_cross(layers, attention, states)
        return graph

    def prefill(self) -> Graph:
        """Several target tokens at once to the logits after the last of them, and the cache.

        Inputs `tokens` `(R, T)` int64 and what the encoder gives. Outputs `logits` `(R, V)` and, for each decoder
        layer, `present_key_i` and `present_value_i` `(R, K, T, P)`.
        """
        graph = Graph("prefill", self.weights)
        tokens = graph.input("tokens", "int64", ["R", "T"])
        number, length = graph.node("Shape", tokens, start=0, end=1), graph.node("Shape", tokens, start=1, end=2)
        total = graph.node("Cast", length, to=TensorProto.INT32)
        places = _range(graph, length)
        target = _Target(
            tokens=graph.node("Reshape", tokens, graph.constant([-1])),
            rows=graph.node("Concat", number, length, graph.constant([-1]), axis=0),
            past_lengths=graph.node("Expand", graph.node("Sub", total, graph.constant([1], np.int32)), number),
            total_length=total,
            slot_bias="",
            places=places,
            token_places=graph.node(
                *("Reshape", graph.node("Expand", places, graph.node("Shape", tokens)), graph.constant([-1]))
            ),
        )
        states = self._decode(graph, target, has_past=False, gives_attention=False)
        by_row = graph.node("Reshape", states, target.rows)
        self._write_logits(graph, graph.node("Gather", by_row, graph.constant(-1), axis=1))
        return graph

    def step(self, *, gives_attention: bool = False) -> Graph:
        """One target token of each row to the logits after it, and the cache with it.

        Inputs `tokens` `(R,)` int64, `position` `(1,)` int64 (the number of tokens before this one), `past_key_i` and
        `past_value_i` `(R, K, past, P)` of each decoder layer, and what the encoder gives for B sources, R a multiple
        of B. Of the slots of the cache: `past_lengths` `(R,)` int32, the one that this token is written to, which is
        the last one that is looked at; `total_length` `(1,)` int32, one more; and `slot_bias` `(1, 1, 1, total)`, what
        is added to the scores of each: 0, or `HIDDEN` where a slot holds nothing. Outputs as those of `prefill`, and
        `attention` `(R, S)` if asked for: cross-attention of the last decoder layer but one (the only one of a single
        layer), the mean over its heads.

        Where the caller gives one buffer `(R, K, capacity, P)` for a past and its present, the new token is written
        into it and nothing is copied; otherwise the present is the past and one token more.
        """
        graph = Graph("step", self.weights)
        target = _Target(
            tokens=graph.input("tokens", "int64", ["R"]),
            rows=graph.constant([0, 1, -1]),
            past_lengths=graph.input("past_lengths", "int32", ["R"]),
            total_length=graph.input("total_length", "int32", [1]),
            slot_bias=graph.input("slot_bias", "float32", [1, 1, 1, "total"]),
            places=graph.input("position", "int64", [1]),
            token_places=None,
        )
        states = self._decode(graph, target, has_past=True, gives_attention=gives_attention)
        self._write_logits(graph, states)
        return graph

    def likeliest(self) -> Graph:
        """Logits to the likeliest tokens.

        Inputs `logits` `(R, V)` and `number` `(1,)` int64. Outputs `ids` `(R, number)` int64, likeliest first, and
        their `log_probs`.

        TopK alone takes twice as long: the highest numbers lie in the groups with the highest maxima, and maxima are
        found several numbers at a time.
        """
        graph, vocab_size = Graph("likeliest", self.weights), self.config.vocab_size
        logits = graph.input("logits", "float32", ["R", vocab_size])
        number = graph.input("number", "int64", [1])
        log_probs = graph.node("LogSoftmax", logits, axis=-1)
        groups = -(-vocab_size // _GROUP)
        if missing := groups * _GROUP - vocab_size:
            pads = graph.constant([0, 0, 0, missing])
            log_probs = graph.node("Pad", log_probs, pads, graph.constant(-np.inf, np.float32))
        # Token i is in group i % groups.
        split = graph.node("Reshape", log_probs, graph.constant([-1, _GROUP, groups]))
        highest = graph.node("ReduceMax", split, graph.constant([1]), keepdims=0)
        wanted = graph.node("Min", number, graph.constant([groups]))
        _, chosen = graph.node_of_many("TopK", highest, wanted, outputs=2, axis=-1, sorted=0)
        members = graph.constant(np.arange(_GROUP) * groups)
        ids = graph.node("Add", graph.node("Unsqueeze", chosen, graph.constant([2])), members)
        ids = graph.node("Reshape", ids, graph.constant([0, -1]))
        of_groups = graph.node("GatherElements", log_probs, ids, axis=1)
        values, places = graph.node_of_many("TopK", of_groups, number, outputs=2, axis=-1)
        graph.output(graph.node("GatherElements", ids, places, axis=1), "ids", "int64", ["R", "number"])
        graph.output(values, "log_probs", "float32", ["R", "number"])
        return graph

    def _embed(self, layers: Layers, stack: Stack, tokens: str, places: str, token_places: str | None) -> str:
        """Embeddings `(N, H)` of tokens `(N,)` with positions and norm.

        Args:
            places: Positions `(L,)`.
            token_places: Which of them each token has, `(N,)`; None where they all have the only one.
        """
        graph, module = layers.graph, getattr(self.model.model, stack)
        table = array_of(module.embed_tokens.weight)
        states = self.operators.embed(graph, tokens, self._table_name(stack), table, module.embed_scale)
        if module.embed_positions is not None:
            vectors = position_vectors(graph, module.embed_positions, f"{stack}.embed_positions", places)
            vectors = vectors if token_places is None else graph.node("Gather", vectors, token_places)
            states = graph.node("Add", states, vectors)
        if module.layernorm_embedding is not None:
            states = layers.norm(states, f"{stack}.layernorm_embedding", module.layernorm_embedding)
        return states

    def _table_name(self, stack: Stack) -> str:
        shared = stack == "encoder" or self.config.share_encoder_decoder_embeddings
        return "shared" if shared else "decoder.embed_tokens"

    def _feed_forward(
        self, layers: Layers, states: str, name: str, layer: SparseqEncoderLayer | SparseqDecoderLayer
    ) -> str:
        norm = f"{name}.final_layer_norm", layer.final_layer_norm
        output = feed_forward(layers, layers.enter(states, *norm), f"{name}.mlp", layer.mlp)
        return layers.leave(states, output, *norm)

    def _write_cross(self, layers: Layers, attention: SourceAttention, states: str) -> None:
        """Cross-attention's keys and values of all decoder layers, from one product."""
        graph, decoder_layers = layers.graph, self._decoder_layers()
        shape = Shape.of(decoder_layers[0].encoder_attn)
        projections = [
            Projection(f"decoder.layers.{index}.encoder_attn.{part}_proj", linear, head_rows(shape.kv_heads))
            for index, layer in enumerate(decoder_layers)
            for part, linear in (("k", layer.encoder_attn.k_proj), ("v", layer.encoder_attn.v_proj))
        ]
        fused = layers.fused(states, "decoder.cross", projections)
        parts = graph.node_of_many("Split", fused, outputs=len(projections), axis=-1, num_outputs=len(projections))
        by_head = [
            graph.node("Transpose", attention.by_source(part, shape.kv_heads, shape.width), perm=[0, 2, 1, 3])
            for part in parts
        ]
        for index in range(len(decoder_layers)):
            self._write_cache(graph, "cross", index, ["B", "S"], by_head[2 * index : 2 * index + 2])

    def _decoder_layers(self) -> list[SparseqDecoderLayer]:
        return list(cast(Iterable[SparseqDecoderLayer], self.model.model.decoder.layers))

    def _decode(self, graph: Graph, target: "_Target", *, has_past: bool, gives_attention: bool) -> str:
        """The decoder's output `(N, H)`; caches become outputs of the graph."""
        layers, decoder = Layers(graph, self.config, self.operators), self.model.model.decoder
        cross_attention = SourceAttention(layers, graph.input("source_mask", "int32", ["B", "S"]))
        rotary = None
        if decoder.rotary is not None:
            rotary = rotary_tables(graph, decoder.rotary, target.places, graph.constant([0]))
        slots = target.past_lengths, target.total_length, target.slot_bias
        self_attention = TargetAttention(layers, target.rows, *slots, rotary)
        states = self._embed(layers, "decoder", target.tokens, target.places, target.token_places)
        for index, layer in enumerate(self._decoder_layers()):
            name = f"decoder.layers.{index}"
            norm = f"{name}.self_attn_layer_norm", layer.self_attn_layer_norm
            past = self._cache_inputs(graph, "past", index, ["R", "past"]) if has_past else ("", "")
            output, *present = self_attention(layers.enter(states, *norm), f"{name}.self_attn", layer.self_attn, past)
            self._write_cache(graph, "present", index, ["R", "present"], present)
            states = layers.leave(states, output, *norm)

            norm = f"{name}.encoder_attn_layer_norm", layer.encoder_attn_layer_norm
            key, value = self._cache_inputs(graph, "cross", index, ["B", "S"])
            query = cross_attention.query(layers.enter(states, *norm), f"{name}.encoder_attn", layer.encoder_attn)
            output = cross_attention.attend(query, key, value, f"{name}.encoder_attn", layer.encoder_attn)
            states = layers.leave(states, output, *norm)
            if gives_attention and index == max(len(decoder.layers) - 2, 0):
                weights = cross_attention.weights(query, key, layer.encoder_attn)
                graph.output(weights, "attention", "float32", ["R", "S"])

            states = self._feed_forward(layers, states, name, layer)
        return states if decoder.norm is None else layers.norm(states, "decoder.norm", decoder.norm)

    def _cache_inputs(self, graph: Graph, name: str, layer: int, dims: list[str]) -> tuple[str, str]:
        """Keys and values `(rows, K, length, P)` of one layer as inputs of a graph."""
        shape = self._cache_shape(*dims)
        key, value = (graph.input(f"{name}_{kind}_{layer}", "float32", shape) for kind in ("key", "value"))
        return key, value

    def _write_cache(self, graph: Graph, name: str, layer: int, dims: list[str], values: Sequence[str]) -> None:
        """Give keys and values of one layer out."""
        for kind, value in zip(("key", "value"), values, strict=True):
            graph.output(value, f"{name}_{kind}_{layer}", "float32", self._cache_shape(*dims))

    def _cache_shape(self, rows: str, length: str) -> list[str | int]:
        shape = Shape.of(self._decoder_layers()[0].self_attn)
        return [rows, shape.kv_heads, length, shape.width]

    def _write_logits(self, graph: Graph, states: str) -> None:
        """Logits `(R, V)` of states `(R, H)`."""
        weight, _ = parameters_of(self.model.lm_head, "lm_head")
        name = self._table_name("decoder") if self.config.tie_word_embeddings else "lm_head"
        buffer = self.model.final_logits_bias
        bias = None if buffer is None else array_of(buffer).reshape(-1)
        logits = self.operators.linear(graph, states, name, weight, bias)
        graph.output(logits, "logits", "float32", ["R", self.config.vocab_size])


class _Target(NamedTuple):
    """What a graph of the decoder knows of its N target tokens.

    Attributes:
        tokens: `(N,)`.
        rows: The shape `(R, T, -1)`.
        past_lengths, total_length, slot_bias: As the inputs of `ModelGraphs.step`; an empty `slot_bias` for none.
        places: Positions `(T,)`.
        token_places: Which of them each token has, `(N,)`; None where they all have the only one.
    """

    tokens: str
    rows: str
    past_lengths: str
    total_length: str
    slot_bias: str
    places: str
    token_places: str | None


def _range(graph: Graph, length: str) -> str:
    """0, 1, ... `(L,)` int64 of a length `(1,)`."""
    return graph.node("Range", graph.constant(0), graph.node("Squeeze", length), graph.constant(1))
