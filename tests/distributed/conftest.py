"""Processes over gloo, started once for all tests of this folder, since most of their time goes into imports."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.scenarios import Results

ROOT = Path(__file__).parents[2]
# Measured: 75 s of one core for two processes. One that waits for one that has failed would wait for half an hour.
TIMEOUT = 500
_WORKER = """
import importlib, os, sys
from pathlib import Path
importlib.import_module(sys.argv[2]).run_all(Path(sys.argv[1]), int(os.environ["RANK"]))
"""


@pytest.fixture(scope="session")
def two_processes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the two processes share; each scenario has one of its name in it."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def on_two_processes(two_processes_folder: Path) -> Results:
    """What each of two processes found in a scenario, by the scenario's name."""
    return _run(two_processes_folder, 2, "tests.distributed.scenarios")


@pytest.fixture(scope="session")
def on_four_processes(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of four processes found, by the name of the mesh that they formed."""
    return _run(tmp_path_factory.mktemp("four"), 4, "tests.distributed.meshes")


def _run(folder: Path, processes: int, module: str) -> Results:
    worker = folder / "worker.py"
    worker.write_text(_WORKER, encoding="utf-8")
    # `--standalone` takes a free port.
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(worker), str(folder), module],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(TIMEOUT)
        finally:
            # The launcher ends its processes, which are in sessions of their own, when it is asked to end.
            process.terminate()
            process.wait()
    assert status == 0, (folder / "output.txt").read_text()[-8000:]

    def results(name: str) -> list[dict[str, Any]]:
        return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(processes)]

    return results
