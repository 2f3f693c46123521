"""`sparseq translate`: formats, files, standard input, interruption, what is left of it, and mistakes."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sparseq.cli import main
from sparseq.translation.translator import Translator
from tests.translation.models import SOURCES, EchoBackend, write_model
from tests.translation.test_translator import echo

pytestmark = pytest.mark.filterwarnings("ignore:The texts hold only enough")

LINES = ["A dog.", "", "Two red balls lie in the garden.", "  ", "Äpfel"]
ECHOED = ["A dog.", "", "Two red balls lie in the garden.", "", "Äpfel"]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    """The command has a translator that echoes; what it was asked for is in `asked` of the backend."""
    translator, backend = echo()

    def from_pretrained(name: str, **options: Any) -> Translator:
        backend.asked = {"name": name, **options}  # type: ignore[attr-defined]
        return translator

    monkeypatch.setattr(Translator, "from_pretrained", from_pretrained)
    return backend


def type_in(monkeypatch: pytest.MonkeyPatch, text: bytes, *, is_terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(text))
    stdin.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def as_input(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def test_standard_input_to_standard_output(
    backend: EchoBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, b"\xef\xbb\xbf" + as_input(LINES).replace(b"\n", b"\r\n"))
    assert main(["translate", "some/model"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ECHOED
    assert err == ""
    assert backend.asked["name"] == "some/model"  # type: ignore[attr-defined]


def test_files_follow_one_another(backend: EchoBackend, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(as_input(LINES))
    # The last line has no end, and a form feed is none.
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"one\ftwo\nthree"))
    files = [str(tmp_path / name) for name in ("a", "b.gz")]
    assert main(["translate", "m", *files, "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out").read_text("utf-8").split("\n")
    assert lines == [*ECHOED, "one\ftwo", "three", ""]


def test_a_model_translates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "tiny")
    (tmp_path / "in").write_bytes(as_input(SOURCES))
    capsys.readouterr()
    assert main(["translate", str(folder), str(tmp_path / "in"), "--target", "de", "--beams", "2"]) == 0
    expected = Translator.from_pretrained(folder, runtime="torch", device="cpu").translate(SOURCES, num_beams=2)
    assert capsys.readouterr().out.split("\n") == [*(one.text for one in expected), ""]


def test_arguments_reach_the_translator(backend: EchoBackend, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("A dog.\n")
    options = "--beams 3 --n-best 2 --max-new-tokens 9 --length-penalty 0.5 --prefix Ein --int8 --runtime torch"
    more = "--device cpu --threads 2 --revision main --cache-dir graphs --batch-tokens 7"
    assert main(["translate", "m", str(tmp_path / "in"), *options.split(), *more.split()]) == 0
    assert backend.asked == {  # type: ignore[attr-defined]
        "name": "m",
        "precision": "int8",
        "runtime": "torch",
        "device": "cpu",
        "threads": 2,
        "cache_dir": Path("graphs"),
        "revision": "main",
    }
    (settings,) = backend.settings
    assert (settings.num_beams, settings.num_return_sequences, settings.max_new_tokens) == (3, 2, 9)
    assert settings.length_penalty == 0.5
    assert backend.batches[0].prefixes[0]
    sampling = "--sample --temperature 0.5 --top-k 3 --top-p 0.9 --seed 4 --n-best 2"
    assert main(["translate", "m", str(tmp_path / "in"), *sampling.split()]) == 0
    settings = backend.settings[-1]
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.5, 3, 0.9)
    assert (settings.num_beams, settings.num_return_sequences, settings.seed) == (1, 2, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", ["m a b --beams 2", "m --beams 2 a b", "--beams 2 m a b", "m a --beams 2 b"])
def test_files_may_stand_before_and_behind_options(
    backend: EchoBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    order: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("ball 1\n")
    Path("b").write_text("ball 2\n")
    assert main(["translate", *order.split()]) == 0
    assert capsys.readouterr().out == "ball 1\nball 2\n"
    assert backend.settings[0].num_beams == 2
    for mistake in (["translate"], ["translate", "m", "--beam", "2"]):
        with pytest.raises(SystemExit) as error:
            main(mistake)
        assert error.value.code == 2
    assert "the following arguments are required: MODEL" in capsys.readouterr().err


def test_formats(backend: EchoBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in (
        (["--scores"], ["-1.0000\tA dog.", "0.0000\t"]),
        (["--n-best", "2", "--beams", "2"], ["1\t-1.0000\tA dog."] * 2 + ["2\t0.0000\t"] * 2),
    ):
        type_in(monkeypatch, as_input(LINES[:2]))
        assert main(["translate", "m", *options]) == 0
        assert capsys.readouterr().out.split("\n") == [*expected, ""]
    type_in(monkeypatch, as_input(LINES[:1]))
    assert main(["translate", "m", "--json", "--beams", "2", "--n-best", "2"]) == 0
    best = {"text": "A dog.", "score": -1.0}
    assert json.loads(capsys.readouterr().out) == {"line": 1, "translations": [best, best]}


def test_progress_goes_to_standard_error_if_asked_for(
    backend: EchoBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, as_input(LINES))
    assert main(["translate", "m", "--progress"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ECHOED
    assert "5 lines" in err


def test_typed_lines_are_streamed(
    backend: EchoBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, as_input(LINES), is_terminal=True)
    assert main(["translate", "m"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ECHOED
    assert "type a line" in err
    assert all(len(batch.input_ids) == 1 for batch in backend.batches)
    type_in(monkeypatch, as_input(LINES), is_terminal=True)
    assert main(["translate", "m", "--beams", "2", "--scores"]) == 0
    assert capsys.readouterr().out.startswith("-1.0000\tA dog.\n")


@pytest.mark.parametrize("format_options", [[], ["--n-best", "2", "--beams", "2"], ["--json"]])
@pytest.mark.parametrize("cut", [0, 1, 30, 10_000])
def test_a_stopped_run_goes_on(backend: EchoBackend, tmp_path: Path, format_options: list[str], cut: int) -> None:
    (tmp_path / "in").write_bytes(as_input([f"ball {number}" for number in range(50)]))
    command = ["translate", "m", str(tmp_path / "in"), *format_options, "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    expected = (tmp_path / "whole").read_bytes()
    assert expected.count(b"ball") == (100 if "--n-best" in format_options else 50)
    (tmp_path / "part").write_bytes(expected[:cut])
    backend.batches.clear()
    assert main([*command, str(tmp_path / "part"), "--resume"]) == 0
    assert (tmp_path / "part").read_bytes() == expected
    if cut > len(expected):
        assert not backend.batches, "nothing is translated twice"


def test_an_output_of_something_else_is_not_gone_on_with(
    backend: EchoBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text("a\nb\n")
    (tmp_path / "out").write_text("1\n2\n3\n")
    assert main(["translate", "m", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--resume"]) == 2
    assert "has 3 lines already, more than there are to translate" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "1\n2\n3\n"


MISTAKES: list[tuple[list[str], str]] = [
    (["m", "absent.en"], r"There is no file absent\.en"),
    (["m", "--beams", "0"], r"--beams must be at least 1, but is 0"),
    (["m", "--beams", "2", "--n-best", "3"], r"--n-best 3 is more than --beams 2"),
    (["m", "--n-best", "3"], r"--n-best 3 needs --beams 3 or more, or --sample"),
    (["m", "--temperature", "0.5"], r"--temperature is for --sample"),
    (["m", "--resume"], r"--resume goes on with a file: name it with --output"),
    (["m", "--output", "there"], r"--output there is there already: go on with it by --resume"),
    (["m", "--output", "no/such/out"], r"there is no folder no/such"),
    (["m", "there", "--output", "there", "--resume"], r"is one of the files to be translated"),
    (["m", "--output", "out.gz"], r"--output out\.gz: what is written is not compressed; name a file without \.gz"),
    (["m", "--output", "out", "--length-penalty", "nan"], r"`length_penalty` must be a number, but is nan"),
    (["m", "--output", "out", "latin1"], r"latin1, line 2: not UTF-8"),
    (["m", "latin1"], r"latin1, line 2: not UTF-8"),
    (["m", "half.gz"], r"half\.gz cannot be decompressed"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_reported_in_one_line(
    backend: EchoBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("x\n")
    Path("latin1").write_bytes(b"fine\nK\xe4se\n")
    Path("half.gz").write_bytes(gzip.compress(b"A dog.\n" * 50)[:-12])
    type_in(monkeypatch, b"a\n")
    assert main(["translate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert re.search(message, err)
    assert not backend.batches
    # The corrected command finds nothing in its way.
    assert not Path("out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    backend: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The permissions of a folder do not bind everybody who may run this.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert main(["translate", "m", "--output", str(tmp_path / "out")]) == 2
    assert f"--output {tmp_path / 'out'} cannot be written" in capsys.readouterr().err
    assert not hasattr(backend, "asked")


def test_nothing_to_translate_makes_an_empty_file(
    backend: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, b"")
    assert main(["translate", "m", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_languages_and_models_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "tiny")
    for arguments, message in (
        ([str(folder), "--target", "fr", "--runtime", "torch"], "target_language fr: .* has tags for de only"),
        ([str(tmp_path / "no/such/model")], "There is no folder"),
        ([str(tmp_path)], "has no config.json"),
    ):
        type_in(monkeypatch, b"a\n")
        assert main(["translate", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


SLOW = textwrap.dedent(
    """
    import signal, sys, time
    from sparseq.cli import main
    from sparseq.translation import batches, translator
    from tests.translation.test_translator import echo

    # A process that was started in the background, as these tests may be, ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made, backend = echo()
    decode = backend.decode

    def slow(batch, settings, **options):
        if len(backend.batches) == 3:
            print("decoding", file=sys.stderr, flush=True)
            time.sleep(60)
        return decode(batch, settings, **options)

    backend.decode = slow
    translator.windows = lambda lines: batches.windows(lines, size=2)
    translator.Translator.from_pretrained = lambda *args, **options: made
    sys.exit(main(["translate", "m", *sys.argv[1:]]))
    """
)


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    """The command in a process of its own, which stops for long before the fourth pair of lines."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SLOW, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        # Python flushes by itself where it is told to.
        env={**os.environ, "PYTHONPATH": ".", "PYTHONUNBUFFERED": ""},
    )


@pytest.mark.parametrize("to_file", [False, True])
def test_what_was_finished_survives_an_interruption(tmp_path: Path, to_file: bool) -> None:
    process = start(*(["--output", str(tmp_path / "out")] if to_file else []))
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(as_input([f"ball {number}" for number in range(12)]))
    process.stdin.close()
    while b"decoding" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "out").read_bytes() if to_file else out == as_input([f"ball {n}" for n in range(6)])
    assert err.decode().endswith("sparseq: interrupted\n")


def test_lines_come_while_the_input_is_still_open() -> None:
    process = start()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"ball 1\nball 2\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(2)] == [b"ball 1\n", b"ball 2\n"]
    process.kill()
    process.communicate()


def test_a_reader_that_has_gone_is_no_error() -> None:
    process = start()
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"ball 1\nball 2\n")
    process.stdin.close()
    assert process.wait(timeout=120) == 141
    assert b"Traceback" not in process.stderr.read()
