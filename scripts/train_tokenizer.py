"""Train a tokenizer; the same as `sparseq train-tokenizer`.

python scripts/train_tokenizer.py train.en.gz train.de.gz --language de --output tokenizer
python scripts/train_tokenizer.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
