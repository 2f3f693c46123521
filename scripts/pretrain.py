"""Pre-train a model on plain text; the same as `sparseq pretrain`, for `accelerate launch`.

python scripts/pretrain.py pretrain-tiny text.folder=corpus text.languages=[en,de] --output outputs/pretrained
accelerate launch --num_processes 2 scripts/pretrain.py pretrain-tiny text.folder=corpus text.languages=[en,de]
python scripts/pretrain.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
