"""Check a model's folder and upload it to the Hub; the same as `sparseq push`.

python scripts/push_to_hub.py outputs/tiny someone/tiny --dry-run
python scripts/push_to_hub.py outputs/tiny someone/tiny --private
python scripts/push_to_hub.py --help
"""

import sys

from sparseq.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
