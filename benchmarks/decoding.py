"""Speed of decoding against MarianMT.generate(), and what grouped queries save.

    python benchmarks/decoding.py speed                           batch 1 and 16, greedy and 4 beams
    python benchmarks/decoding.py speed --settings 1x1 --systems sparseq sparseq-sparse --rounds 15
    python benchmarks/decoding.py grouped                         cache bytes a token, long outputs at batch 64

"sparseq" is model.generate(), "onnx" what sparseq.Translator runs, both also sparse and in int8; "ctranslate2" is our
model exported there. Systems of a setting take turns in one process, with the same number of threads and the same
global settings of torch. What counts is the process' CPU time over threads: a speed is the median over rounds of
MarianMT.generate()'s time over that of the system in the same round.

Weights are random, so that every output is as long as it may be. Geometry "small": d_model 256, 3 + 3 layers, 4 heads,
as many key-value heads, feed-forward 1,024, vocabulary 8,000, ReLU, post-norm; "base": 512, 6 + 6, 8, 2,048, 32,000.
A sparse model has 8 experts of half the width in every layer, two for each token: the active parameters of the dense
one.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from interleave import interleave, ratios, setting  # type: ignore[import-not-found]  # it lies beside this script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from sparseq import SparseqConfig, SparseqForConditionalGeneration
from sparseq.cli import main as sparseq
from sparseq.text_table import format_table

BASE = "marian"
PAD, END = 0, 2
STACKS = ("encoder", "decoder")
GEOMETRIES = {
    "small": {"d_model": 256, "layers": 3, "attention_heads": 4, "ffn_dim": 1024, "vocab_size": 8000},
    "base": {"d_model": 512, "layers": 6, "attention_heads": 8, "ffn_dim": 2048, "vocab_size": 32000},
}
SYSTEMS = (
    "sparseq",
    "sparseq-sparse",
    "onnx",
    "onnx-int8",
    "onnx-sparse",
    "onnx-sparse-int8",
    "ctranslate2",
    "ctranslate2-int8",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; `--json` keeps every time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "grouped"))
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--settings", nargs="+", default=["1x1", "16x1", "16x4"], metavar="BATCHxBEAMS")
    parser.add_argument("--source", type=int, default=24, help="tokens of a source (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="new tokens (default: 64; grouped: 256)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and all times there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    results = measure_speed(args) if args.what == "speed" else measure_grouped(args)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """All systems in all settings."""
    args.tokens = args.tokens or 64
    results: dict[str, Any] = describe(args, ["onnxruntime", "ctranslate2"])
    rows = [["batch", "beams", *("system", "speed", "ms")]]
    with tempfile.TemporaryDirectory() as folder:
        made = Systems(args, Path(folder))
        for name in args.settings:
            batch, beams = map(int, name.split("x"))
            systems = {one: made.make(one, batch, beams) for one in (BASE, *args.systems)}
            seconds = interleave(systems, rounds=args.rounds)
            results["seconds"][name] = seconds
            speeds = {one: 1 / ratio for one, ratio in ratios(seconds, BASE).items()}
            for one, speed in speeds.items():
                milliseconds = 1000 * statistics.median(seconds[one])
                rows.append([str(batch), str(beams), one, f"{speed:.2f}", f"{milliseconds:.0f}"])
            print(f"measured {name}", flush=True)
    print(format_table(rows, "rrlrr"))
    return results


def measure_grouped(args: argparse.Namespace) -> dict[str, Any]:
    """Grouped queries against the same model with as many key-value heads as heads; ratios are to that one."""
    args.tokens = args.tokens or 256
    batch = 64
    results: dict[str, Any] = describe(args, ["onnxruntime"])
    heads = GEOMETRIES[args.geometry]["attention_heads"]
    twins = {count: our_model(args.geometry, kv_heads=count) for count in (heads, heads // 2, 1)}
    rows = [["key-value heads", "cache bytes a token", "generate()", "Translator"]]
    with tempfile.TemporaryDirectory() as folder:
        made = Systems(args, Path(folder))
        systems: dict[str, Callable[[], object]] = {}
        for count, model in twins.items():
            systems[f"generate-{count}"] = made.generate(model, batch, 1)
            systems[f"onnx-{count}"] = made.run_engine(model, f"kv-{count}", "float32", batch, 1)
        results["seconds"][f"{batch}x1"] = seconds = interleave(systems, rounds=args.rounds, warmup=1)
    for count, model in twins.items():
        speeds = [1 / ratios(seconds, f"{kind}-{heads}")[f"{kind}-{count}"] for kind in ("generate", "onnx")]
        rows.append([str(count), str(cache_bytes(model)), *(f"{speed:.2f}" for speed in speeds)])
    print(format_table(rows, "rrrr"))
    return results


def describe(args: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """What was measured and where, before the times."""
    found = {name: metadata.version(name) for name in packages if find_spec(name) is not None}
    facts = {name: getattr(args, name) for name in ("geometry", "source", "tokens", "threads", "rounds")}
    here = setting()
    return {"setting": {**here, "versions": {**here["versions"], **found}}, **facts, "seconds": {}}


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values that one more target token takes in the decoder."""
    ids = torch.ones(1, 2, dtype=torch.long)
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True}
    cache = model.generate(ids, attention_mask=ids, **settings).past_key_values.self_attention_cache
    return sum(layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes for layer in cache.layers)


def sizes(geometry: str) -> dict[str, Any]:
    """Fields that both configurations have."""
    fields: dict[str, Any] = {"activation_function": "relu", "max_position_embeddings": 1024, "scale_embedding": True}
    for name, value in GEOMETRIES[geometry].items():
        is_shared = name in ("d_model", "vocab_size")
        fields |= {name: value} if is_shared else {f"{stack}_{name}": value for stack in STACKS}
    return fields


def marian(geometry: str) -> Any:
    """The peer, with random weights."""
    tokens: dict[str, Any] = {
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": PAD,
        "forced_eos_token_id": None,
    }
    torch.manual_seed(0)
    config = MarianConfig(**sizes(geometry), **tokens)
    return endless(MarianMTModel._from_config(config, attn_implementation="sdpa"))


def our_model(geometry: str, *, sparse: bool = False, kv_heads: int | None = None) -> Any:
    """Ours of the same shape, with random weights."""
    fields: dict[str, Any] = {
        **sizes(geometry),
        **dict.fromkeys(("attention_bias", "ffn_bias", "expert_bias"), True),
        **{f"{stack}_num_key_value_heads": kv_heads for stack in STACKS},
        "num_experts": 8 if sparse else 0,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "gated_ffn": False,
        "position_embedding_type": "sinusoidal",
        "norm_type": "layernorm",
        "norm_position": "post",
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": PAD,
    }
    torch.manual_seed(0)
    return endless(SparseqForConditionalGeneration(SparseqConfig(**fields)))


def endless(model: Any) -> Any:
    """In evaluation mode, and with no token that ends a sentence."""
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    return model.eval()


class Systems:
    """Calls that decode a batch, by the name of a system.

    Args:
        args: `geometry`, `source`, `tokens` and `threads`.
        folder: For what systems need on disk.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.models: dict[str, Any] = {}

    def make(self, name: str, batch: int, beams: int) -> Callable[[], object]:
        """The call for one system, which was tried: its outputs have the right length."""
        if name == BASE:
            return self.generate(self._model(BASE), batch, beams)
        kind = "sparse" if "sparse" in name.split("-") else "dense"
        precision = "int8" if name.endswith("-int8") else "float32"
        if name.startswith("onnx"):
            return self.run_engine(self._model(kind), kind, precision, batch, beams)
        if name.startswith("ctranslate2"):
            return self.run_ctranslate2(self._model(kind), precision, batch, beams)
        return self.generate(self._model(kind), batch, beams)

    def _model(self, kind: str) -> Any:
        if kind not in self.models:
            geometry = self.args.geometry
            self.models[kind] = marian(geometry) if kind == BASE else our_model(geometry, sparse=kind == "sparse")
        return self.models[kind]

    def _source(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        high = GEOMETRIES[self.args.geometry]["vocab_size"]
        return torch.randint(END + 1, high, (batch, self.args.source), generator=generator)

    def generate(self, model: Any, batch: int, beams: int) -> Callable[[], object]:
        """model.generate()."""
        ids = self._source(batch)
        options = {"num_beams": beams, "do_sample": False, "max_new_tokens": self.args.tokens}
        mask = torch.ones_like(ids)

        def call() -> torch.Tensor:
            return model.generate(ids, attention_mask=mask, **options)

        assert call().shape == (batch, 1 + self.args.tokens)
        return call

    def run_engine(self, model: Any, name: str, precision: str, batch: int, beams: int) -> Callable[[], object]:
        """What sparseq.Translator does between token ids and token ids."""
        from sparseq.graphs.files import export_graphs
        from sparseq.translation.backend import Batch
        from sparseq.translation.onnx_engine import OnnxEngine
        from sparseq.translation.runtime_backend import RuntimeBackend

        folder = self.folder / f"{name}-{precision}"
        if not folder.exists():
            export_graphs(model, folder, precision=precision)  # type: ignore[arg-type]  # a str of two
        backend = RuntimeBackend(OnnxEngine(folder, threads=self.args.threads))
        settings = GenerationConfig(
            num_beams=beams, max_new_tokens=self.args.tokens, decoder_start_token_id=PAD, pad_token_id=PAD
        )
        ids = self._source(batch).numpy()
        inputs = Batch(ids, np.ones_like(ids), [()] * batch)

        def call() -> object:
            return backend.decode(inputs, settings)

        assert all(len(one.token_ids) == self.args.tokens for (one,) in backend.decode(inputs, settings))
        return call

    def run_ctranslate2(self, model: Any, precision: str, batch: int, beams: int) -> Callable[[], object]:
        """Our model as `sparseq export --to ctranslate2` writes it."""
        import ctranslate2

        folder = self.folder / "ctranslate2"
        if not folder.exists():
            checkpoint = self.folder / "checkpoint"
            model.save_pretrained(checkpoint)
            word_tokenizer(model.config.vocab_size).save_pretrained(checkpoint)
            status = sparseq(["export", str(checkpoint), str(folder), "--to", "ctranslate2"])
            assert status == 0
        translator = ctranslate2.Translator(
            str(folder), compute_type=precision, inter_threads=1, intra_threads=self.args.threads
        )
        sentences = [[f"w{token}" for token in row] for row in self._source(batch).tolist()]
        options: Mapping[str, Any] = {
            "beam_size": beams,
            "min_decoding_length": self.args.tokens,
            "max_decoding_length": self.args.tokens,
        }

        def call() -> object:
            return translator.translate_batch(sentences, **options)

        assert all(
            len(one.hypotheses[0]) == self.args.tokens for one in translator.translate_batch(sentences, **options)
        )
        return call


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which token 17 is the word "w17", for engines that take words."""
    vocab = {f"w{number}": number for number in range(vocab_size)}
    for name, number in (("<pad>", PAD), ("</s>", END), ("<unk>", 1)):
        del vocab[f"w{number}"]
        vocab[name] = number
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    raise SystemExit(main())
