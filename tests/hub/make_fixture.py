"""Write the models that every later version must go on loading: python -m tests.hub.make_fixture

`fixtures/v1` is what a version of format 1 wrote: two models with random weights of a few kilobytes, one sparse and
one dense, which between them have every kind of weight, and what they compute, in `expected.json`. Once a version has
been released its fixture stays as it is; with `FORMAT_VERSION` raised, this writes the next one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from sparseq import SparseqConfig, SparseqForConditionalGeneration
from sparseq.configuration_sparseq import FORMAT_VERSION
from sparseq.modeling_sparseq import CODE_FILES
from sparseq.training.tokenizer import train_tokenizer

FIXTURES = Path(__file__).with_name("fixtures")
TEXTS = ["<2de> A man walks.", "<2de> Two dogs run in a park."]
_SIZES: dict[str, Any] = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_num_key_value_heads": 1,
    "decoder_num_key_value_heads": 1,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    # Large, so that outputs differ much where something is amiss.
    "initializer_range": 0.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {
        **_SIZES,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "expert_ffn_dim": 4,
        "num_shared_experts": 1,
        "router_balancing": "loss_free",
    },
    "dense": {
        **_SIZES,
        "d_model": 4,
        "num_experts": 0,
        "gated_ffn": False,
        "activation_function": "gelu",
        "position_embedding_type": "learned",
        "max_position_embeddings": 24,
        "position_offset": 2,
        "norm_type": "layernorm",
        "norm_position": "post",
        "embedding_norm": True,
        "tie_word_embeddings": False,
        "share_encoder_decoder_embeddings": False,
        "attention_bias": True,
        "ffn_bias": True,
        "final_logits_bias": True,
    },
}


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of both models, without the 256 bytes, which would be most of it."""
    return train_tokenizer(TEXTS * 4, vocab_size=48, algorithm="bpe", language_tags=["de"], show_progress=False)


def make_model(name: str, vocab_size: int) -> SparseqForConditionalGeneration:
    """A model in which no weight has the value that it begins with, biases and buffers included."""
    torch.manual_seed(1)
    model = AutoModelForSeq2SeqLM.from_config(SparseqConfig(vocab_size=vocab_size, **MODELS[name]))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape) / 4)
    model.generation_config.max_length = 12
    return model.eval()


@torch.no_grad()
def observe(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model makes of `TEXTS`: ids, the logits of the last of two decoder positions, a greedy generation."""
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = model(**batch, decoder_input_ids=torch.tensor([[1, 9], [1, 11]])).logits[:, -1]
    return {
        "ids": batch["input_ids"].tolist(),
        "logits": [[round(value, 5) for value in row] for row in logits.tolist()],
        "generated": model.generate(**batch).tolist(),
    }


def write(folder: Path) -> None:
    """Write both models, without the code files, which belong to the version that reads."""
    for name in MODELS:
        # Anew, because a tokenizer that has padded a batch saves that it did.
        tokenizer = make_tokenizer()
        model = make_model(name, len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for file in CODE_FILES:
            (folder / name / file).unlink()
        (folder / name / "expected.json").write_text(json.dumps(observe(model, tokenizer)) + "\n", "utf-8")


if __name__ == "__main__":
    target = FIXTURES / f"v{FORMAT_VERSION}"
    if target.exists():
        raise SystemExit(f"{target} is there already. Only a fixture of no released version may be deleted.")
    write(target)
