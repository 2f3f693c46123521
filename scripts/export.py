"""Write a Sparseq model for other programs; the same as `sparseq export`.

python scripts/export.py models/bart exported --to bart
python scripts/export.py outputs/sparse exported --to onnx
python scripts/export.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
