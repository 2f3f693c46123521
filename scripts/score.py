"""Score a trained model on parallel text; the same as `sparseq score`.

python scripts/score.py outputs/tiny --data corpus --source en --target de --split test --bootstrap 1000
python scripts/score.py outputs/tiny --baseline outputs/dense --data corpus --source en --target de --metrics chrf
python scripts/score.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
