"""Translate standard input or files with a trained model; the same as `sparseq translate`.

python scripts/translate.py outputs/tiny < test.en > test.de
python scripts/translate.py outputs/tiny test.en --beams 4 --output test.de
python scripts/translate.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["translate", *sys.argv[1:]]))
