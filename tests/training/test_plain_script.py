"""A stock script fine-tunes a folder of ours where this package is not installed."""

import itertools
import json
from pathlib import Path

from sparseq.training.tokenizer import train_tokenizer
from tests.absent import run_without_package
from tests.tiny import tiny_model

# As if by `python plain_script.py ...`.
_RUN_SCRIPT = """
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_script_that_has_never_heard_of_us(tmp_path: Path) -> None:
    words = {"red": "rot", "big": "groß", "old": "alt", "a": "ein"}
    nouns = {"house": "Haus", "boat": "Boot", "book": "Buch"}
    pairs = [
        {"source": f"a {first} {second} {noun}", "target": f"ein {words[first]} {words[second]} {nouns[noun]}"}
        for first, second, noun in itertools.product(["red", "big", "old"], ["red", "big", "old"], nouns)
    ]
    (tmp_path / "data.json").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    texts = [text for pair in pairs for text in pair.values()]
    tokenizer = train_tokenizer(texts, vocab_size=300, min_frequency=1, show_progress=False)
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=None, dropout=0.1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    script = Path(__file__).with_name("plain_script.py")
    arguments = (script, tmp_path / "model", tmp_path / "data.json", tmp_path)
    result = json.loads(run_without_package(_RUN_SCRIPT, *arguments, home=tmp_path))
    # It learns its 27 sentences; a decoder that saw its labels, or a loss off by a position, would not say them.
    assert result["before"]["eval_bleu"] < 20
    assert result["after"]["eval_bleu"] > 90
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"] / 4
    assert result["same"]
    assert "nan" not in json.dumps(result["log"]).lower()
