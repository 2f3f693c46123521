"""A user of the `sparseq` command, in a process of its own: runs commands one after the other.

    python -I command_client.py < COMMANDS.json > RESULTS.json

COMMANDS.json: [[argument, ...], ...]. A result is [exit status, what the command wrote to standard error].
"""

import contextlib
import io
import json
import sys

from sparseq.cli import main


def run(arguments: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            status = main(arguments)
        except SystemExit as leave:
            status = int(leave.code or 0)
    return status, errors.getvalue()


if __name__ == "__main__":
    results = [run(arguments) for arguments in json.load(sys.stdin)]
    json.dump(results, sys.stdout)
