"""Trainings in processes of their own that end themselves at a chosen point, for the tests of resume."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, EarlyStoppingCallback

from sparseq import SparseqConfig
from sparseq.data.collation import PairCollator, TokenizedPairs
from sparseq.training.trainer import SparseqTrainer, SparseqTrainingArguments

VOCAB = 40
# More than a run takes on a busy machine, less than the test's own limit.
TIMEOUT = 240


@dataclass(frozen=True)
class Kill:
    """A process that sends itself a signal in the `call`-th call of a function.

    Attributes:
        where: "module:attribute", such as "torch:save".
        call: Which call, from 1.
        about: Count only calls with an argument that holds this text.
        after: Only when the function has done its work.
        half: Before, write half of what `torch.save` would have written.
        signum: The signal.
        rank: Of several processes, the one that gets it; None for all.
    """

    where: str
    call: int = 1
    about: str = ""
    after: bool = False
    half: bool = False
    signum: int = signal.SIGKILL
    rank: int | None = None

    def arm(self) -> None:
        """Put the trap into this process."""
        if self.rank is not None and os.environ["RANK"] != str(self.rank):
            return
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, name)
        calls = 0

        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            counts = not self.about or any(self.about in str(arg) for arg in args)
            calls += counts
            if not counts or calls != self.call:
                return original(*args, **kwargs)
            if self.half:
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            result = original(*args, **kwargs) if self.after else None
            os.kill(os.getpid(), self.signum)
            return result if self.after else original(*args, **kwargs)

        setattr(owner, name, trapped)


def tiny_pairs(size: int = 40, seed: int = 0) -> TokenizedPairs:
    """Random sentence pairs of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> list[int]:
        length = int(torch.randint(2, 9, (1,), generator=generator))
        return [*torch.randint(4, VOCAB, (length,), generator=generator).tolist(), 2]

    return TokenizedPairs([sentence() for _ in range(size)], [sentence() for _ in range(size)])


def tiny_trainer(folder: Path, model: dict[str, Any], arguments: dict[str, Any]) -> SparseqTrainer:
    """A trainer of a sparse model with dropout, balanced without a loss."""
    heads = {
        f"{stack}_{kind}": 2 for stack in ("encoder", "decoder") for kind in ("attention_heads", "num_key_value_heads")
    }
    sizes = {
        f"{stack}_{kind}": size for stack in ("encoder", "decoder") for kind, size in (("layers", 1), ("ffn_dim", 16))
    }
    experts = {"num_experts": 4, "expert_ffn_dim": 8, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    balancing = {"router_balancing": "loss_free", "router_scoring": "sigmoid"}
    config = {"vocab_size": VOCAB, "d_model": 16, "dropout": 0.1, **heads, **sizes, **experts, **balancing, **model}
    defaults = {
        "tokens_per_batch": 32,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "save_steps": 3,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "logging_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
    }
    merged = {**defaults, **arguments}
    patience = merged.pop("patience", None)
    torch.manual_seed(0)
    return SparseqTrainer(
        model=AutoModelForSeq2SeqLM.from_config(SparseqConfig(**config)),
        args=SparseqTrainingArguments(output_dir=str(folder), **merged),
        train_dataset=tiny_pairs(),
        eval_dataset=tiny_pairs(12, seed=1),
        data_collator=PairCollator(pad_token_id=0),
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )


def train(folder: Path, model: dict[str, Any], arguments: dict[str, Any], resume: bool = False) -> None:
    """Train in `folder`, from its last complete checkpoint where there is one."""
    from sparseq.training.checkpoints import last_complete_checkpoint

    trainer = tiny_trainer(folder, model, arguments)
    trainer.train(resume_from_checkpoint=resume and last_complete_checkpoint(folder) is not None)


def sparseq_command(*words: str) -> None:
    """`sparseq WORDS`."""
    from sparseq.cli import main

    sys.exit(main(words))


def _child(
    function: Callable[..., None], args: Sequence[Any], kill: Kill | None, errors: Path, ranks: dict[str, str]
) -> None:
    os.environ.update(ranks)
    # Ignored where the tests were started in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if kill is not None:
        kill.arm()
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        raise


def run(
    function: Callable[..., None], *args: Any, errors: Path, kill: Kill | None = None, processes: int = 1
) -> list[int]:
    """Call a function in new processes, each forked from a server that has imported everything.

    Returns:
        The exit status of each; negative for the signal that ended it. `errors` holds what they wrote; of
        several processes each has a file of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sparseq.training.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        ranks = {name: str(value) for name, value in place.items()}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        file = errors if processes == 1 else errors.with_name(f"{errors.name}.{rank}")
        child = context.Process(target=_child, args=(function, args, kill, file, ranks if processes > 1 else {}))
        child.start()
        children.append(child)
    for child in children:
        child.join(TIMEOUT)
        if child.exitcode is None:
            child.kill()
            child.join()
    return [child.exitcode or 0 for child in children]


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """Weights, optimizer, schedule and random numbers of two checkpoints are bit-identical, and so is the progress."""
    assert (actual / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    names = {path.name for path in expected.iterdir() if path.suffix in (".pt", ".pth")}
    assert names == {path.name for path in actual.iterdir() if path.suffix in (".pt", ".pth")}
    assert {"optimizer.pt", "scheduler.pt"} < names
    for name in names:
        _assert_equal(_load(actual / name), _load(expected / name), name)


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def _assert_equal(actual: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            _assert_equal(actual[key], value, f"{where}: {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for one, other in zip(actual, expected, strict=True):
            _assert_equal(one, other, where)
    elif hasattr(expected, "shape"):
        assert (actual == expected).all(), where
    else:
        assert actual == expected, where
