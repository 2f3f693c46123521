"""Steps of generate(): what they take as short cuts changes no number, and nothing in the cache is copied or moved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sparseq import SparseqForConditionalGeneration, decoding_sparseq
from sparseq.cache_sparseq import SparseqCache, TargetLayer
from sparseq.decoding_sparseq import DecoderStep, HeadStep, LinearStep, SparseMLPStep, packs, padded
from sparseq.modeling_sparseq import SparseqAttention, SparseqSparseMLP
from tests.absent import run_without_package
from tests.tiny import PAD, source_batch, tiny_model
from tests.tolerances import assert_close

DENSE = {"num_experts": 0}
KINDS: dict[str, dict[str, Any]] = {
    "sparse, gated, pre-norm, rotary": {},
    "dense, post-norm, sinusoidal, layer norm, biases": {
        **DENSE,
        "norm_position": "post",
        "norm_type": "layernorm",
        "position_embedding_type": "sinusoidal",
        "attention_bias": True,
        "ffn_bias": True,
        "gated_ffn": False,
        "activation_function": "relu",
    },
    "multi-head, learned positions, embedding norm, logits bias": {
        **DENSE,
        "decoder_num_key_value_heads": 4,
        "position_embedding_type": "learned",
        "position_offset": 2,
        "embedding_norm": True,
        "final_logits_bias": True,
    },
    "sparse, plain, biases, sigmoid, loss-free, shared experts": {
        "gated_ffn": False,
        "expert_bias": True,
        "router_scoring": "sigmoid",
        "router_balancing": "loss_free",
        "num_shared_experts": 1,
        "decoder_num_key_value_heads": 2,
        "position_embedding_type": "none",
    },
    "sparse, one expert a token, weights as they are, every other layer": {
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "2 beams": {"num_beams": 2},
    "5 beams, 3 returned": {"num_beams": 5, "num_return_sequences": 3},
    "17 beams, which do not share": {"num_beams": 17},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


def endless(**overrides: Any) -> SparseqForConditionalGeneration:
    """A model that never stops early, and whose untied random weights do not repeat the last token for ever."""
    model = tiny_model(tie_word_embeddings=False, **overrides)
    model.generation_config.eos_token_id = None
    for buffer in model.buffers():
        torch.nn.init.normal_(buffer, std=0.3)
    return model


def generate(model: Any, ids: torch.Tensor, **settings: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(ids, **{"max_new_tokens": 12, "do_sample": False, "top_k": 0, **settings})


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the target at which a step was taken the short way."""
    taken: list[int] = []
    original = DecoderStep.__call__

    def counted(self: DecoderStep, input_ids: torch.Tensor, cache: SparseqCache, *args: Any) -> torch.Tensor:
        taken.append(cache.get_seq_length())
        return original(self, input_ids, cache, *args)

    monkeypatch.setattr(DecoderStep, "__call__", counted)
    return taken


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_decoding_gives_what_it_gives_without_a_cache(kind: str, way: str, steps: list[int]) -> None:
    model, ids = endless(**KINDS[kind]), source_batch()
    expected = generate(model, ids, use_cache=False, **WAYS[way])
    assert not steps
    assert torch.equal(generate(model, ids, **WAYS[way]), expected)
    assert steps == list(range(1, 12)), "the short way was not taken"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_steps_are_those_of_one_forward(kind: str) -> None:
    model, ids = endless(**KINDS[kind]), source_batch()
    output = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    expected = model(input_ids=ids, decoder_input_ids=output.sequences[:, :-1]).logits
    assert_close(torch.stack(output.logits, dim=1), expected, torch.float32)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[HeadStep]:
    """Those that calls of generate() make."""
    made: list[HeadStep] = []
    original = HeadStep.__init__
    monkeypatch.setattr(HeadStep, "__init__", lambda self: (made.append(self), original(self))[1])
    return made


LONG = DecoderStep._PAID_BY + 16
# Steps by which it pays to lay the head out anew, for one row.
PAID_BY = 2 * HeadStep._PAID_BY


@pytest.fixture(params=["oneDNN", "without oneDNN"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What lays weights out anew, small ones too."""
    monkeypatch.setattr(LinearStep, "_SMALL", 0)
    if request.param == "oneDNN":
        if not packs():
            pytest.skip("torch has no oneDNN here")
    else:
        monkeypatch.setattr(decoding_sparseq, "packs", lambda: False)
    return str(request.param)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, int]]:
    """Shapes of the weights that may be laid out anew, and the numbers that were copied for each."""
    made: list[tuple[torch.Size, int]] = []
    original = LinearStep.lay_out

    def noted(self: LinearStep, rows: int) -> int:
        shape, copied = self.weight.shape, original(self, rows)
        made.append((shape, copied))
        return copied

    monkeypatch.setattr(LinearStep, "lay_out", noted)
    return made


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of experts that are laid out anew."""
    calls: list[int] = []
    original = SparseMLPStep._sorted

    def counted(self: SparseMLPStep, tokens: torch.Tensor, *choice: torch.Tensor) -> torch.Tensor:
        calls.append(tokens.shape[0])
        return original(self, tokens, *choice)

    monkeypatch.setattr(SparseMLPStep, "_sorted", counted)
    return calls


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_laid_out_anew_give_the_logits_of_one_forward(
    kind: str, rows: int, layout: str, copies: list[tuple[torch.Size, int]], sorts: list[int]
) -> None:
    # As wide as it takes for outputs to be twice the inputs.
    model, ids = endless(**KINDS[kind], vocab_size=128), source_batch(((7, 4, 6, 5) * 5)[:rows])
    output = generate(model, ids, output_logits=True, return_dict_in_generate=True, max_new_tokens=LONG)
    expected = model(input_ids=ids, decoder_input_ids=output.sequences[:, :-1]).logits
    assert_close(torch.stack(output.logits, dim=1), expected, torch.float32)
    assert model.lm_head.weight.shape in [shape for shape, _ in copies]
    # Queries of both kinds of attention, and their outputs, in each layer.
    assert len(copies) > 4 * len(model.model.decoder.layers)
    sparse = [layer.mlp for layer in model.model.decoder.layers if isinstance(layer.mlp, SparseqSparseMLP)]
    has_many = any(rows * mlp.router.top_k > SparseMLPStep._FEW for mlp in sparse)
    # In every step from then on; the first token is not a step.
    later = LONG - DecoderStep._PAID_BY
    assert len(sorts) == (len(sparse) * later if has_many and layout == "oneDNN" else 0)
    for (outputs, inputs), copied in copies:
        gains = rows <= 16 and outputs >= 2 * inputs if rows == 1 or layout != "oneDNN" else True
        assert copied == (outputs * inputs if gains else 0)


def hook_the_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output.roll(1, dims=-1))


def change_the_head(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))


def replace_the_head(model: Any) -> None:
    head = torch.nn.Linear(*model.lm_head.weight.T.shape, bias=True)
    torch.nn.init.normal_(head.bias)
    head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, dims=0))
    model.lm_head = head


class At(LogitsProcessor):
    """Does something to a model when it has written so many tokens."""

    def __init__(self, length: int, do: Any, model: Any) -> None:
        self.length, self.do, self.model = length, do, model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            self.do(self.model)
        return scores


@pytest.mark.parametrize("change", [hook_the_head, change_the_head, replace_the_head])
@pytest.mark.parametrize("length", [1, PAID_BY - 3, PAID_BY + 5])
@pytest.mark.parametrize("lengths", [(7,), (7, 4)])
def test_a_head_that_changes_is_the_one_that_is_used(
    lengths: tuple[int, ...], length: int, change: Any, heads: list[HeadStep], layout: str
) -> None:
    written = []
    for has_cache in (True, False):
        model, ids = endless(vocab_size=128), source_batch(lengths)
        at = LogitsProcessorList([At(length, change, model)])
        written.append(generate(model, ids, max_new_tokens=LONG, logits_processor=at, use_cache=has_cache))
    assert torch.equal(*written)
    (head,) = heads
    assert head.linear is not None or length < PAID_BY
    unchanged = generate(endless(vocab_size=128), source_batch(lengths), max_new_tokens=LONG)
    assert not torch.equal(written[0], unchanged), "the change has no effect"


@pytest.mark.parametrize("kind", ["as usual", "a bias", "bfloat16", "autocast", "few outputs", "large"])
def test_a_head_is_left_as_it_is_where_that_gains_nothing(
    kind: str, heads: list[HeadStep], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = endless(vocab_size=60 if kind == "few outputs" else 128), source_batch((7,))
    if kind == "a bias":
        replace_the_head(model)
    elif kind == "bfloat16":
        model = model.to(torch.bfloat16)
    elif kind == "large":
        monkeypatch.setattr(HeadStep, "_LARGEST", 1000)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        generate(model, ids, max_new_tokens=LONG)
    (head,) = heads
    assert (head.linear is not None) == (kind == "as usual")


@pytest.mark.parametrize("rows", [1, 4])
def test_copies_of_weights_are_bounded(
    rows: int, layout: str, copies: list[tuple[torch.Size, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecoderStep, "_COPIED", 4000)
    monkeypatch.setattr(HeadStep, "_LARGEST", 0)
    generate(endless(**DENSE), source_batch((7, 4, 6, 5)[:rows]), max_new_tokens=LONG)
    assert 0 < sum(copied for _, copied in copies) <= 4000


def test_experts_are_laid_out_all_or_none(
    copies: list[tuple[torch.Size, int]], sorts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(LinearStep, "_SMALL", 0)
    monkeypatch.setattr(HeadStep, "_LARGEST", 0)
    model, ids = endless(decoder_layers=1), source_batch((7,) * 5)
    generate(model, ids, max_new_tokens=LONG)
    needed = sum(copied for _, copied in copies)
    assert sorts
    sorts.clear()
    copies.clear()
    monkeypatch.setattr(DecoderStep, "_COPIED", needed - 1)
    tokens = generate(model, ids, max_new_tokens=LONG)
    weight_in, _, weight_out, _ = model.model.decoder.layers[0].mlp.experts.stacked_parameters()
    assert sum(copied for _, copied in copies) == needed - weight_in.numel() - weight_out.numel()
    assert not sorts
    assert torch.equal(tokens, generate(model, ids, max_new_tokens=LONG, use_cache=False))


def test_small_weights_are_left_as_they_are(copies: list[tuple[torch.Size, int]]) -> None:
    generate(endless(**DENSE, vocab_size=128), source_batch(), max_new_tokens=LONG)
    assert {copied for _, copied in copies} == {0}


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_layers_in_other_precisions_are_left_as_they_are(
    kind: str, layout: str, copies: list[tuple[torch.Size, int]]
) -> None:
    model = endless(**DENSE).to(torch.bfloat16) if kind == "bfloat16" else endless(**DENSE)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        generate(model, source_batch(), max_new_tokens=LONG)
    assert {copied for _, copied in copies} <= {0}


def test_weights_made_in_inference_mode_are_used(layout: str) -> None:
    with torch.inference_mode():
        model, ids = endless(**DENSE, vocab_size=128), source_batch()
        tokens = generate(model, ids, max_new_tokens=LONG)
        assert torch.equal(tokens, generate(model, ids, max_new_tokens=LONG, use_cache=False))


def test_a_torch_without_these_products_or_with_others_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ops:
        def _reorder_linear_weight(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
            return weight

        def _linear_pointwise(self, states: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
            return states @ weight.T

    for ops in (object(), Ops()):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "mkldnn", ops)
            assert not decoding_sparseq._can_pack.__wrapped__()


def test_a_switched_off_onednn_is_not_used() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packs()


def test_products_are_of_few_sizes_and_little_larger_than_needed() -> None:
    sizes = [padded(rows) for rows in range(1, 1025)]
    assert all(rows <= size for rows, size in enumerate(sizes, start=1))
    assert all(size <= max(8, 1.25 * rows) for rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 30


def test_another_default_device_changes_nothing(layout: str) -> None:
    model, ids = endless(), source_batch((7,) * 5)
    expected = generate(model, ids, max_new_tokens=LONG, use_cache=False)
    with torch.device("meta"):
        tokens = generate(model, ids, max_new_tokens=LONG)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("kind", ["strided biases", "sparse weights"])
@pytest.mark.parametrize("rows", [1, 5])
def test_unusual_weights_are_used_as_they_are(kind: str, rows: int, layout: str) -> None:
    model, ids = endless(**DENSE, ffn_bias=True), source_batch((7,) * rows)
    for layer in model.model.decoder.layers:
        projection = layer.mlp.up_proj
        if kind == "strided biases":
            bias = torch.nn.init.normal_(projection.bias.detach())
            projection.bias = torch.nn.Parameter(bias.repeat_interleave(2)[::2])
        else:
            projection.weight = torch.nn.Parameter(projection.weight.detach().to_sparse_csr(), requires_grad=False)
    output = generate(model, ids, output_logits=True, return_dict_in_generate=True, max_new_tokens=LONG)
    expected = model(input_ids=ids, decoder_input_ids=output.sequences[:, :-1]).logits
    assert_close(torch.stack(output.logits, dim=1), expected, torch.float32)


class Copying(LogitsProcessor):
    """Copies the cache of a call, as its caller might."""

    def __init__(self, caches: list[SparseqCache]) -> None:
        self.caches, self.copies = caches, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == LONG - 2:
            self.copies = [copy.deepcopy(cache) for cache in self.caches]
        return scores


def test_a_cache_may_be_copied_during_a_call(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[SparseqCache] = []
    original = SparseqCache.__init__
    monkeypatch.setattr(
        SparseqCache,
        "__init__",
        lambda self, *args, **kwargs: (original(self, *args, **kwargs), caches.append(self))[0],
    )
    copying = Copying(caches)
    generate(endless(**DENSE), source_batch(), max_new_tokens=LONG, logits_processor=LogitsProcessorList([copying]))
    (made,) = copying.copies
    assert made.step is None
    assert made.get_seq_length() == LONG - 2


def test_a_prefix_is_continued_by_beams_that_share(steps: list[int]) -> None:
    model, ids = endless(), source_batch()
    prefix = torch.tensor([[1, 8, 9], [1, 5, 5], [1, 30, 4]])
    expected = generate(model, ids, decoder_input_ids=prefix, num_beams=4, use_cache=False)
    assert torch.equal(generate(model, ids, decoder_input_ids=prefix, num_beams=4), expected)
    assert steps[0] == 3


def test_beams_past_the_first_room_and_the_first_block_of_positions() -> None:
    model, ids = endless(max_position_embeddings=256, position_embedding_type="sinusoidal"), source_batch((5, 3))
    # So that memory of its own is used from the start, and grows.
    TargetLayer._COPIED, copied = 0, TargetLayer._COPIED
    try:
        tokens = generate(model, ids, num_beams=3, max_new_tokens=140)
    finally:
        TargetLayer._COPIED = copied
    assert torch.equal(generate(model, ids, num_beams=3, max_new_tokens=140), tokens)
    assert torch.equal(generate(model, ids, num_beams=3, max_new_tokens=140, use_cache=False), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_no_beam_descends_from_are_let_go(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseqCache, "_MANY", 8)
    model, ids = endless(**{**KINDS[kind], "max_position_embeddings": 64}), source_batch((5, 3, 6))
    options = {"num_beams": 4, "max_new_tokens": 48}
    output = generate(model, ids, return_dict_in_generate=True, **options)
    cache = output.past_key_values
    assert cache.get_seq_length() == 48
    kept = {layer.keys.shape[2] for layer in cache.self_attention_cache.layers}
    assert len(kept) == 1
    assert max(kept) < 48 * 4 * 0.75
    assert torch.equal(output.sequences, generate(model, ids, use_cache=False, **options))
    with pytest.raises(ValueError, match="let go of tokens"):
        cache.crop(-1)


def test_learned_positions_are_used_to_the_last() -> None:
    model, ids = endless(position_embedding_type="learned", max_position_embeddings=20), source_batch()
    expected = generate(model, ids, max_new_tokens=20, use_cache=False)
    assert torch.equal(generate(model, ids, max_new_tokens=20), expected)
    with pytest.raises(ValueError, match="21 tokens"):
        generate(model, ids, max_new_tokens=21)


def test_nothing_of_the_source_is_repeated_and_nothing_of_the_target_moves() -> None:
    model, ids = endless(), source_batch()
    cache = generate(model, ids, num_beams=4, return_dict_in_generate=True).past_key_values
    heads, size = model.config.decoder_num_key_value_heads, 8
    for source, target in zip(cache.cross_attention_cache.layers, cache.self_attention_cache.layers, strict=True):
        assert source.keys.shape == source.values.shape == (3, heads, ids.shape[1], size)
        assert target.keys.shape == target.values.shape == (3, heads, 12 * 4, size)
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_memory_is_written_in_place_once_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetLayer, "_COPIED", 0)
    layer, places, pairs = TargetLayer(), [], []
    for _ in range(200):
        key, value = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4)
        pairs.append((key, value))
        keys, values = layer.update(key, value)
        places.append(keys.data_ptr())
    assert torch.equal(keys, torch.cat([key for key, _ in pairs], dim=2))
    assert torch.equal(values, torch.cat([value for _, value in pairs], dim=2))
    # Room for 64, 130 and 262 tokens.
    assert len(dict.fromkeys(places)) == 3


@torch.no_grad()
def test_a_layer_goes_on_after_its_tokens_were_taken_or_its_rows_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetLayer, "_COPIED", 0)
    layer, states = TargetLayer(), torch.randn(2, 2, 3, 6, 4)
    layer.update(states[0], states[1])
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([1, 1]))
    more = torch.randn(2, 3, 1, 4)
    keys, values = layer.update(more, -more)
    assert torch.equal(keys, torch.cat([states[0][[1, 1], :, :4], more], dim=2))
    assert torch.equal(values, torch.cat([states[1][[1, 1], :, :4], -more], dim=2))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(more, more)[0], more)


def test_gradients_flow_through_a_cache() -> None:
    model, ids = endless(**DENSE), source_batch()
    tokens = torch.tensor([[1, 7, 9, 4]] * 3)
    TargetLayer._COPIED, copied = 0, TargetLayer._COPIED
    try:
        cache = SparseqCache()
        halves = [
            model(input_ids=ids, decoder_input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in tokens.split(2, dim=1)
        ]
    finally:
        TargetLayer._COPIED = copied
    torch.cat(halves, dim=1).square().mean().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids, decoder_input_ids=tokens).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_close(grads[name], parameter.grad, torch.float32, name)


def test_rows_of_one_source_need_it_once() -> None:
    model, ids = endless(), source_batch()
    targets = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(3))
    states = model.get_encoder()(ids)
    mask = ids.ne(PAD).long()
    shared = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=targets).logits
    expected = model(input_ids=ids.repeat_interleave(2, dim=0), decoder_input_ids=targets).logits
    assert_close(shared, expected, torch.float32)
    with pytest.raises(ValueError, match="5 rows, but the source 3"):
        model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=targets[:5])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_shown_for_each_row_of_a_shared_source(implementation: str) -> None:
    model, ids = endless(), source_batch()
    model.set_attn_implementation(implementation)
    shown = generate(model, ids, num_beams=2, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(shown.sequences, generate(model, ids, num_beams=2))
    if implementation == "sdpa":
        return
    for step in shown.cross_attentions:
        for weights in step:
            assert weights.shape == (6, 4, 1, ids.shape[1])
            assert_close(weights.sum(dim=-1), torch.ones(6, 4, 1), torch.float32)


def test_what_looks_into_the_layers_sees_every_step(steps: list[int]) -> None:
    model, ids = endless(), source_batch()
    expected = generate(model, ids, num_beams=2)
    steps.clear()
    seen = []
    handle = model.model.decoder.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(generate(model, ids, num_beams=2), expected)
    handle.remove()
    assert (len(seen), steps) == (12, [])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj", "down_proj", "gate_proj"]])
def test_adapters_are_not_passed_over(targets: list[str]) -> None:
    model, ids = endless(**DENSE), source_batch()
    before = generate(model, ids)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.eval()
    tokens = generate(adapted, ids)
    assert not torch.equal(tokens, before)
    assert torch.equal(generate(adapted.merge_and_unload(), ids), tokens)


def test_adapters_on_experts_are_not_passed_over() -> None:
    model, ids = endless(), source_batch((9,))
    before = generate(model, ids)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(target_modules=[], target_parameters=names, init_lora_weights=False, r=4)
    adapted = get_peft_model(model, config)
    adapted.eval()
    tokens = generate(adapted, ids)
    assert not torch.equal(tokens, before)
    assert torch.equal(generate(adapted.merge_and_unload(), ids), tokens)


def test_new_weights_are_seen_by_the_next_call_and_by_who_goes_on_with_a_cache() -> None:
    model, ids = endless(), source_batch()
    output = generate(model, ids, return_dict_in_generate=True)
    cache, tokens = output.past_key_values, output.sequences
    assert cache.step is None
    assert copy.deepcopy(cache).get_seq_length() == 12
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
        logits = model(
            input_ids=ids, decoder_input_ids=tokens[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True
        ).logits
        # Keys and values of before, everything else of now.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "step", DecoderStep(model.model.decoder))
            states = model.get_encoder()(ids)
            stepped = model(
                encoder_outputs=states,
                attention_mask=ids.ne(PAD).long(),
                decoder_input_ids=tokens[:, -1:],
                past_key_values=cache,
                use_cache=True,
            ).logits
    assert_close(stepped, logits, torch.float32)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


class Interrupting(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_nothing_behind() -> None:
    model, ids = endless(), source_batch()
    expected = generate(model, ids)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, stopping_criteria=StoppingCriteriaList([Interrupting()]))
    assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_steps_stay_near_the_forward(kind: str) -> None:
    model, ids = endless(**KINDS[kind]).to(torch.bfloat16), source_batch()
    output = generate(model, ids, output_logits=True, return_dict_in_generate=True, max_new_tokens=4)
    expected = model(input_ids=ids, decoder_input_ids=output.sequences[:, :-1]).logits
    scale = expected.abs().max()
    assert_close(torch.stack(output.logits, dim=1) / scale, expected / scale, torch.bfloat16)


def test_autocast_steps_stay_near_the_forward() -> None:
    model, ids = endless(), source_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = generate(model, ids, output_logits=True, return_dict_in_generate=True, max_new_tokens=4)
        expected = model(input_ids=ids, decoder_input_ids=output.sequences[:, :-1]).logits
    scale = expected.abs().max()
    assert_close(torch.stack(output.logits, dim=1) / scale, expected / scale, torch.bfloat16)


class DoubledAttention(SparseqAttention):
    """One that adds what the class it comes from does not know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(*args, **kwargs)
        return -2 * output, weights


class WrappedLayer(torch.nn.Module):
    """A layer in a wrapper that adds a direction to its output, as for steering."""

    def __init__(self, layer: torch.nn.Module, direction: torch.Tensor):
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, routing = self.layer(*args, **kwargs)
        return states + self.direction, routing


class Halved(torch.nn.Module):
    """In the place of an activation."""

    def forward(self, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return up / 2 if gate is None else up * gate / 2


def change_attention(model: Any) -> None:
    model.model.decoder.layers[0].self_attn.__class__ = DoubledAttention


def change_layer(model: Any) -> None:
    layers = model.model.decoder.layers
    layers[1] = WrappedLayer(layers[1], torch.randn(32, generator=torch.Generator().manual_seed(0)))


def change_activation(model: Any) -> None:
    model.model.decoder.layers[0].mlp.act_fn = Halved()


def change_the_class(model: Any) -> None:
    model.model.decoder.layers[0].mlp.forward = lambda states, mask=None: (states * 2, None)


@pytest.mark.parametrize("change", [change_attention, change_layer, change_activation, change_the_class])
def test_changed_modules_are_not_passed_over(change: Any, steps: list[int]) -> None:
    model, ids = endless(**DENSE), source_batch()
    before = generate(model, ids)
    change(model)
    steps.clear()
    tokens = generate(model, ids, use_cache=False)
    assert not torch.equal(tokens, before)
    assert torch.equal(generate(model, ids), tokens)
    assert not steps


def test_a_hook_on_an_activation_runs(steps: list[int]) -> None:
    model, ids = endless(**DENSE), source_batch()
    model.model.decoder.layers[0].mlp.act_fn.register_forward_hook(lambda _, __, output: output * 3)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    assert not steps


def test_dropout_that_somebody_left_on_stays_on(steps: list[int]) -> None:
    model, ids = endless(dropout=0.5), source_batch()
    for layer in model.model.decoder.layers:
        layer.train()
    first = generate(model, ids)
    torch.manual_seed(6)
    assert not torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), first)
    assert not steps


def test_modules_that_peft_trains_whole_are_used() -> None:
    model, ids = endless(**DENSE), source_batch()
    config = LoraConfig(target_modules=r"model\.encoder\.layers\.\d+\.self_attn\.q_proj", modules_to_save=["mlp"])
    adapted: Any = get_peft_model(model, config).eval()
    with torch.no_grad():
        adapted.base_model.model.model.decoder.layers[0].mlp.modules_to_save["default"].down_proj.weight.mul_(-2)
    assert torch.equal(generate(adapted, ids), generate(adapted, ids, use_cache=False))


def test_without_its_no_grad_generate_gives_gradients() -> None:
    model, ids = endless(**DENSE), source_batch()
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = type(model).generate.__wrapped__(model, ids, **settings)
    output.logits[-1].square().sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_returned_cache_goes_on_with_rows_taken_out_or_repeated() -> None:
    model, ids = endless(), source_batch((9, 9, 9))
    settings = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    output = generate(model, ids, **settings)
    tokens, cache = output.sequences, output.past_key_values

    def continued(cache: Any, sources: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=sources, decoder_input_ids=rows[:, -1:], past_key_values=cache, use_cache=True).logits

    def expected(sources: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=sources, decoder_input_ids=rows).logits[:, -1:]

    repeated = ids.repeat_interleave(2, dim=0)
    for sources in (ids, repeated):
        assert_close(continued(copy.deepcopy(cache), sources, tokens), expected(repeated, tokens), torch.float32)
    chosen = torch.tensor([0, 3, 5])
    fewer = copy.deepcopy(cache)
    fewer.batch_select_indices(chosen)
    assert_close(
        continued(fewer, repeated[chosen], tokens[chosen]), expected(repeated[chosen], tokens[chosen]), torch.float32
    )
    cache.batch_repeat_interleave(2)
    more, sources = tokens.repeat_interleave(2, dim=0), repeated.repeat_interleave(2, dim=0)
    assert_close(continued(cache, ids, more), expected(sources, more), torch.float32)
    beams = generate(model, ids, num_beams=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="with 2 beams the rows of a source share memory"):
        beams.batch_select_indices(chosen)


def test_a_cache_of_other_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetLayer, "_COPIED", 0)
    layer = TargetLayer()
    layer.update(torch.zeros(3, 1, 1, 2), torch.zeros(3, 1, 1, 2))
    with pytest.raises(ValueError, match="one of 3 rows, but there are tokens of 1"):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


def test_a_cache_of_inference_mode_goes_on_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetLayer, "_COPIED", 0)
    layer, states = TargetLayer(), torch.randn(3, 1, 2, 1, 4)
    with torch.inference_mode():
        layer.update(states[0], states[0])
    with torch.no_grad():
        layer.update(states[1], states[1])
        keys, _ = layer.update(states[2], states[2])
    assert torch.equal(keys, torch.cat(list(states), dim=2))


def test_encoder_outputs_may_be_a_tuple_and_other_arguments_tensors() -> None:
    model, ids = endless(), source_batch((9, 9, 9))
    expected = generate(model, ids)
    states = model.get_encoder()(ids).last_hidden_state
    assert torch.equal(generate(model, ids, encoder_outputs=(states,)), expected)
    plain = model(input_ids=ids, decoder_input_ids=ids)
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids, extra=torch.ones(3)).logits, plain.logits)


def test_a_step_has_every_field_that_an_output_has(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = endless(), source_batch()
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kwargs: seen.append(forward(**kwargs)) or seen[-1])
    generate(model, ids)
    assert steps
    step = seen[-1]
    whole = model(input_ids=ids, decoder_input_ids=ids[:, :1])
    for name in vars(whole):
        assert getattr(step, name) is None or name in ("logits", "past_key_values")


def test_steps_are_taken_where_the_package_is_missing(tmp_path: Path) -> None:
    endless().save_pretrained(tmp_path / "model")
    code = """
import sys
import torch
from transformers import AutoModelForSeq2SeqLM

model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.generation_config.eos_token_id = None
taken = []
model.generate(torch.arange(3, 9)[None], max_new_tokens=2)
(steps,) = [module for name, module in sys.modules.items() if name.endswith("decoding_sparseq")]
step = steps.DecoderStep.__call__
steps.DecoderStep.__call__ = lambda *arguments: taken.append(1) or step(*arguments)
settings = {"num_beams": 3, "max_new_tokens": 7, "do_sample": False}
cached, uncached = (model.generate(torch.arange(3, 9)[None], use_cache=cached, **settings) for cached in (True, False))
print(torch.equal(cached, uncached), len(taken))
"""
    assert run_without_package(code, tmp_path / "model", home=tmp_path) == "True 6"
