"""`python -m sparseq`: the same as the `sparseq` command."""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main())
