"""Tables on disk: complete or absent, whatever kills the process that writes them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sparseq.data.store import Store, Texts, content_key

SCHEMA = pa.schema([("text", pa.string())])
WORDS = [f"word {number}" for number in range(25)]


def batches(size: int = 10) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(WORDS), size):
        yield pa.record_batch([pa.array(WORDS[start : start + size])], SCHEMA)


def all_stay(table: Any) -> tuple[np.ndarray, dict[str, Any]]:
    return np.ones(len(table), dtype=bool), {"rows seen": len(table)}


def test_an_entry_comes_back_with_its_note(tmp_path: Path) -> None:
    Store(tmp_path).put("key", SCHEMA, batches(), all_stay)
    found = Store(tmp_path).get("key")
    assert found is not None
    table, note = found
    assert (list(table["text"]), note) == (WORDS, {"rows seen": 25})
    assert Store(tmp_path).get("other") is None


def test_rows_that_do_not_stay_are_gone(tmp_path: Path) -> None:
    mask = np.arange(25) % 3 == 0
    Store(tmp_path).put("key", SCHEMA, batches(), lambda table: (mask, {}))
    found = Store(tmp_path).get("key")
    assert found is not None
    assert list(found[0]["text"]) == WORDS[::3]
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["data.arrow", "note.json"]


def test_texts_are_a_sequence(tmp_path: Path) -> None:
    Store(tmp_path).put("key", SCHEMA, batches(), all_stay)
    found = Store(tmp_path).get("key")
    assert found is not None
    texts = Texts(found[0], "text")
    assert (len(texts), list(texts), texts[3], texts[-1]) == (25, WORDS, WORDS[3], WORDS[-1])
    assert texts[8:22:3] == WORDS[8:22:3]
    assert texts[20:99] == WORDS[20:]
    with pytest.raises(IndexError):
        texts[25]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> Iterator[pa.RecordBatch]:
        yield from batches()
        raise ValueError("line 26 is broken")

    with pytest.raises(ValueError, match="line 26"):
        Store(tmp_path).put("key", SCHEMA, fails(), all_stay)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["data cut", "note cut", "note missing", "data missing"])
def test_a_damaged_entry_is_none_and_can_be_made_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.put("key", SCHEMA, batches(), all_stay)
    path = tmp_path / "key" / ("data.arrow" if "data" in damage else "note.json")
    if "missing" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert Store(tmp_path).get("key") is None
    store.put("key", SCHEMA, batches(), all_stay)
    assert store.get("key") is not None


def test_a_killed_writer_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_store import SCHEMA, all_stay, batches
from sparseq.data.store import Store

def until_killed():
    yield from batches()
    os.kill(os.getpid(), signal.SIGKILL)

Store(Path({str(tmp_path)!r})).put("key", SCHEMA, until_killed(), all_stay)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith("key.partial-")
    store = Store(tmp_path)
    assert store.get("key") is None
    store.put("key", SCHEMA, batches(), all_stay)
    assert store.get("key") is not None
    store.prune()
    assert os.listdir(tmp_path) == ["key"]


def test_prune_keeps_what_was_used(tmp_path: Path) -> None:
    for key in ("old", "new"):
        Store(tmp_path).put(key, SCHEMA, batches(), all_stay)
    store = Store(tmp_path)
    store.get("new")
    store.prune()
    assert os.listdir(tmp_path) == ["new"]
    Store(tmp_path / "absent").prune()


def test_keys_differ_with_every_part() -> None:
    keys = {
        content_key(),
        content_key(a=1),
        content_key(a=2),
        content_key(a="1"),
        content_key(b=1),
        content_key(a=[1]),
    }
    assert len(keys) == 6
    assert content_key(a=1, b=2) == content_key(b=2, a=1)
