"""Running code as where this package is not installed."""

import os
import subprocess
import sys
from pathlib import Path

_ABSENT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sparseq":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


def run_without_package(code: str, *arguments: Path, home: Path) -> str:
    """
    Run `code` in a new process in which `import sparseq` fails; returns its last line of output.

    Args:
        arguments: What it finds in `sys.argv`.
        home: Its current folder, and that of its caches.
    """
    process = subprocess.run(
        [sys.executable, "-I", "-c", _ABSENT + code, *arguments],
        cwd=home,
        env={**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")},
        # A question about trust must be an answer of "no", not a wait.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]
