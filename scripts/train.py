"""Train a model from a recipe; the same as `sparseq train`, for `accelerate launch`.

python scripts/train.py tiny-sparse data.folder=corpus data.source=en data.target=de --output outputs/tiny
accelerate launch --num_processes 2 scripts/train.py tiny-sparse data.folder=corpus data.source=en data.target=de
python scripts/train.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
