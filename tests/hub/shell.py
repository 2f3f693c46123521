"""A user's terminal, in a process of its own: runs `sparseq` commands one after the other, for a Hub of the tests.

    python -I shell.py < COMMANDS > RESULTS

A line of COMMANDS: {"arguments": [...], "environment": {name: value or null}}. A line of RESULTS: {"status", "out",
"err"}. One process for many commands, since importing torch and transformers is most of what one costs; nothing that a
command reads at import may therefore be in its environment.
"""

import contextlib
import io
import json
import logging
import os
import sys

from sparseq.cli import main


def run(arguments: list[str], environment: dict[str, str | None]) -> dict[str, object]:
    before = dict(os.environ)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: object = main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def serve() -> None:
    # The client's own log goes to the real standard error, where the tests do not look.
    logging.disable(logging.WARNING)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(run(command["arguments"], command["environment"])), flush=True)


if __name__ == "__main__":
    serve()
