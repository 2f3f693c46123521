"""Plant one defect at a time in a copy of the package and see the tests fail.

    python tests/planted_defects.py                 # all, about half a minute each on 2 cores
    python tests/planted_defects.py "head not tied" # one

Prints the test that noticed each defect, and exits with status 1 if a defect went unnoticed, 2 if the tests
fail with nothing planted.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Parity first: most defects of the model show there within seconds.
_SUITE = ("tests/parity", "tests/modeling", "tests/configuration")


class Defect(NamedTuple):
    """Text that stands once in the files of the model, and what it is replaced by."""

    name: str
    old: str
    new: str


DEFECTS = [
    Defect("padding mask ignored", "return input_ids.ne(pad)", "return torch.ones_like(input_ids).bool()"),
    Defect(
        "padding mask not given to generate()",
        'if model_input_name == "input_ids" and model_kwargs.get("attention_mask") is None:',
        "if False:",
    ),
    Defect("head not tied", "if config.tie_word_embeddings:", "if False:"),
    Defect("cache dropped", "key, value = cache.update(key, value, self.layer_idx)", "pass"),
    Defect(
        "cross-attention cache of another layer",
        "key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values",
        "key, value = cache.layers[0].keys, cache.layers[0].values",
    ),
    Defect(
        "tokens let go that a beam descends from",
        "kept = int(is_needed.sum(dim=1).max())",
        "kept = int(is_needed.sum(dim=1).min())",
    ),
    Defect(
        "positions that do not count tokens that were let go",
        "(super().get_seq_length(layer_idx) + self._forgotten) // self.beams",
        "super().get_seq_length(layer_idx) // self.beams",
    ),
    Defect(
        "a vocabulary's weight that was laid out before it changed",
        "if weight is head.weight and version == weight._version:",
        "if weight is head.weight:",
    ),
    Defect("packed biases with strides", "self.bias.detach().contiguous()", "self.bias.detach()"),
    Defect(
        "packed experts in another order",
        "torch.cat(made).index_select(0, places)",
        "torch.cat(made).index_select(0, order)",
    ),
    Defect(
        "labels shifted twice",
        "labels.to(logits.device).reshape(-1)",
        "labels.to(logits.device).roll(-1, -1).reshape(-1)",
    ),
    Defect("projected loss without its bias", "projected.to(losses.dtype) + bias", "projected.to(losses.dtype)"),
    Defect("gradient of a projected loss without smoothing", "grad.sub_(smoothing / len(weight))", "pass"),
    Defect("projected loss past hooks and adapters", "if not _is_plain(self.lm_head) or", "if"),
    Defect(
        "router jitter in evaluation too",
        "if self.training and self.jitter_noise > 0:",
        "if self.jitter_noise > 0:",
    ),
    Defect(
        "masked outputs not scaled up",
        "weights = (weights / (1.0 - self.output_masking)).masked_fill(masked, 0.0)",
        "weights = weights.masked_fill(masked, 0.0)",
    ),
    Defect(
        "expert dropout left out",
        "SparseqActivation(config.activation_function, dropout)",
        "SparseqActivation(config.activation_function, config.activation_dropout)",
    ),
    Defect(
        "selection biases cast with the model",
        "if kept is not None and moved.dtype != kept.dtype:",
        "if False:",
    ),
    Defect(
        "selection biases moved the wrong way",
        "torch.sign(counts.mean() - counts)",
        "torch.sign(counts - counts.mean())",
    ),
    Defect(
        "gradients of moved rows out of order",
        "gathered = _Rearrange.apply(grad, inverse, order, 1)",
        "gathered = _Rearrange.apply(grad, order, inverse, 1)",
    ),
    Defect(
        "auxiliary losses counted for padding",
        "choices = counted.expand(len(indices), rows, length, top_k).flatten(2) / top_k",
        "choices = torch.ones_like(counted).expand(len(indices), rows, length, top_k).flatten(2) / top_k",
    ),
    Defect(
        "one expert never run",
        "* top_k_weights[..., None]\n    return outputs.sum",
        "* top_k_weights.masked_fill(top_k_index == 1, 0.0)[..., None]\n    return outputs.sum",
    ),
    Defect(
        "cross-attention dropped",
        "is_cross_attention = encoder_hidden_states is not None",
        "is_cross_attention = False",
    ),
    Defect(
        "query heads share the wrong keys",
        "key = key.repeat_interleave(groups, dim=1)",
        "key = key.repeat(1, groups, 1, 1)",
    ),
    Defect("scores not scaled", "self.scaling = self.head_dim**-0.5", "self.scaling = 1.0"),
    Defect(
        "encoder looks no further than the past",
        "is_decoder=False, is_causal=False",
        "is_decoder=False, is_causal=True",
    ),
    Defect(
        "positions count padding",
        "(attention_mask.long().cumsum(dim=-1) - 1)",
        "(torch.ones_like(attention_mask).long().cumsum(dim=-1) - 1)",
    ),
    Defect(
        "sinusoid exponent of the odd dimensions",
        "parts = (angles.sin().float(), angles.cos().float())",
        "parts = (angles.sin().float(), (angles * 0.9).cos().float())",
    ),
    Defect(
        "positions without their offset",
        "angles = _angles(position_ids + self.offset,",
        "angles = _angles(position_ids,",
    ),
    Defect(
        "rotation the wrong way",
        "torch.cat([-second, first], dim=-1) * sin",
        "torch.cat([second, -first], dim=-1) * sin",
    ),
    Defect(
        "embeddings not scaled",
        "return embeds * self.embed_scale if self.embed_scale != 1.0 else embeds",
        "return embeds",
    ),
    Defect("final norm dropped", "self.norm = make_norm(config) if config.final_norm else None", "self.norm = None"),
    Defect(
        "logits bias dropped",
        "return logits if self.final_logits_bias is None else logits + self.final_logits_bias",
        "return logits",
    ),
    Defect("routing weights not renormalised", "if self.norm_topk_prob:", "if False:"),
    Defect(
        "selection bias in the weights", "weights = scores.gather(-1, indices)", "weights = choice.gather(-1, indices)"
    ),
    Defect("padding sent to experts", "indices = indices.masked_fill(~token_mask[:, None], self.num_experts)", "pass"),
    Defect("shared experts dropped", "outputs = outputs + self.shared_experts(hidden_states)[0]", "pass"),
    Defect(
        "gate and up exchanged",
        "down_proj_bias\n\n    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:\n        gate, up = ",
        "down_proj_bias\n\n    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:\n        up, gate = ",
    ),
    Defect(
        "loss a mean of micro-batch means",
        "    if num_items_in_batch is None:\n        num_items_in_batch = labels",
        "    if True:\n        num_items_in_batch = labels",
    ),
    Defect(
        "router losses not weighted by sentence",
        "balance = num_experts * (share / tokens * (mean_score / tokens)).sum(dim=-1)",
        "balance = num_experts * (share / tokens * (mean_score / tokens)).sum(dim=-1) * 0 + 1",
    ),
    Defect(
        "router losses lost in training",
        "result.loss = result.loss + coefficient * term",
        "pass",
    ),
    Defect(
        "smoothing in evaluation",
        "return self.config.label_smoothing if self.training else 0.0",
        "return self.config.label_smoothing",
    ),
    Defect(
        "experts skipped behind a masked prefix",
        "return labels.ne(-100).flip(1).cumsum(dim=1).flip(1).bool()",
        "return labels.ne(-100)",
    ),
    Defect("learned positions unchecked", "length > limit:", "length > limit + 10**9:"),
    Defect("heads that do not divide accepted", "if heads % kv_heads:", "if False:"),
    Defect(
        "active parameters count all experts",
        "experts = self.num_experts_per_tok if active else self.num_experts",
        "experts = self.num_experts",
    ),
]


def place_of(defect: Defect) -> Path:
    """The file in which a defect's text stands."""
    found = [path for path in (ROOT / "sparseq").glob("*_sparseq.py") if defect.old in path.read_text("utf-8")]
    if len(found) != 1:
        raise ValueError(f"the text of {defect.name!r} stands in {len(found)} files of the model: mend it")
    return found[0]


def noticed_by(defect: Defect | None) -> str | None:
    """Name of the first test that fails with the defect planted, or with nothing changed; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "clone"
        for part in ("sparseq", "tests", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "model_card.md"):
            shutil.copy(ROOT / name, copy / name)
        if defect is not None:
            path = copy / place_of(defect).relative_to(ROOT)
            path.write_text(path.read_text("utf-8").replace(defect.old, defect.new), "utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--no-header", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, *_SUITE], cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"pytest did not run with {defect}:\n{done.stdout}\n{done.stderr}")
    return found[1]


def main() -> int:
    """Plant what was asked for, or everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="defects to plant (default: all)")
    args = parser.parse_args()
    unknown = set(args.names) - {defect.name for defect in DEFECTS}
    if unknown:
        parser.error(f"no such defect: {', '.join(sorted(unknown))}; there are: {', '.join(d.name for d in DEFECTS)}")
    # A suite that is red already would notice everything.
    broken = noticed_by(None)
    if broken is not None:
        print(f"{broken} fails with nothing planted; mend that first")
        return 2
    unnoticed = 0
    for defect in DEFECTS:
        if args.names and defect.name not in args.names:
            continue
        test = noticed_by(defect)
        unnoticed += test is None
        print(f"{defect.name:45} {test or 'NOT NOTICED'}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    raise SystemExit(main())
