"""Average the weights of several checkpoints; the same as `sparseq average`.

python scripts/average.py outputs/tiny --last 5 --output outputs/tiny-average
python scripts/average.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["average", *sys.argv[1:]]))
