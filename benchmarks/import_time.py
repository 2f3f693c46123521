"""Measures how long `import sparseq` takes, as a ratio of `from transformers import MarianMTModel`.

Each import runs in a fresh process, the two alternate so that both see the same load on the machine, and the ratio is
that of the medians. Run it on an idle machine:

    python benchmarks/import_time.py
    python benchmarks/import_time.py --rounds 31 --json import_time.json
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from interleave import setting  # type: ignore[import-not-found]  # it lies beside this script
from tqdm import tqdm

OURS = "import sparseq"
BASELINE = "from transformers import MarianMTModel"
BAR = 1.1
_TIMED = "import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"


def import_seconds(statement: str) -> float:
    """Seconds that an import statement takes in a fresh process, the interpreter's own start not counted."""
    command = [sys.executable, "-c", _TIMED.format(statement=statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of every round for both statements; a first round, which only fills the file caches, is not counted."""
    seconds: dict[str, list[float]] = {OURS: [], BASELINE: []}
    for index in tqdm(range(rounds + 1), desc="rounds", file=sys.stderr):
        # Alternating who goes first cancels what one import leaves behind for the next.
        order = (OURS, BASELINE) if index % 2 else (BASELINE, OURS)
        for statement in order:
            elapsed = import_seconds(statement)
            if index:
                seconds[statement].append(elapsed)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=15, help="times each import is measured (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {args.rounds}")

    seconds = measure(args.rounds)
    medians = {statement: median(values) for statement, values in seconds.items()}
    ratio = medians[OURS] / medians[BASELINE]
    result = {"setting": setting(), "seconds": seconds, "medians": medians, "ratio": ratio, "bar": BAR}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    for statement, value in medians.items():
        print(f"{value:8.3f} s  {statement}  (median of {args.rounds})")
    print(f"{ratio:8.3f}    ratio; at most {BAR}: {'yes' if ratio <= BAR else 'NO'}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
