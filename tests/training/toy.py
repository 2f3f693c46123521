"""A toy corpus and a recipe that trains on it in a second or two."""

from pathlib import Path
from typing import Any

from sparseq.training.recipes import Recipe, build_recipe

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    words = list(WORDS)
    for split, size in (("train", 90), ("val", 12), ("test", 10)):
        lines = [[words[(i * k + i // 7) % 6] for k in range(2, 4 + i % 5)] for i in range(size)]
        (folder / f"{split}.en").write_text("".join(" ".join(line) + "\n" for line in lines))
        (folder / f"{split}.de").write_text(
            "".join(" ".join(WORDS[w] for w in reversed(line)) + "\n" for line in lines)
        )


def toy_recipe(corpus: Path, **training: Any) -> Recipe:
    heads = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    heads |= dict.fromkeys(["encoder_num_key_value_heads", "decoder_num_key_value_heads"], 1)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return build_recipe(
        "toy",
        {
            "model": {**sizes, **heads, "num_experts": 4, "dropout": 0.1, "label_smoothing": 0.1},
            "tokenizer": {"vocab_size": 310},
            "data": {"folder": str(corpus), "source": "en", "target": "de", "test": "test", "max_length": 40},
            "training": {
                "max_steps": 10,
                "tokens_per_batch": 128,
                "warmup_steps": 2,
                "learning_rate": 0.01,
                "save_steps": 3,
                "eval_steps": 5,
                "logging_steps": 2,
                "average_checkpoints": 3,
                **training,
            },
            "decoding": {"num_beams": 2, "max_length": 20},
        },
    )
