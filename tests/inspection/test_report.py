"""What the command prints about groups, tokens and dead experts."""

import json
from pathlib import Path

import pytest

from sparseq import SparseqConfig
from sparseq.inspection.report import dead_expert_warnings, format_groups, format_tokens, shift, show, write
from sparseq.inspection.routing import LayerLoad
from sparseq.inspection.survey import GroupRouting
from sparseq.inspection.tokens import ExpertTokens, TokenShare


def load(shares: tuple[float, ...], stack: str = "encoder", layer: int = 1, tokens: int = 10_000) -> LayerLoad:
    return LayerLoad(
        stack="encoder" if stack == "encoder" else "decoder",
        layer=layer,
        tokens=tokens,
        load=shares,
        router_entropy=1.5,
        mean_top1_probability=0.5,
    )


def token(text: str, share: float = 0.5) -> TokenShare:
    return TokenShare(id=1, token=text, count=round(share * 100), occurrences=100, information=1.0)


def group(name: str, *loads: LayerLoad, skipped: int = 0) -> GroupRouting:
    tokens = tuple(
        tuple(
            ExpertTokens(by_count=(token(f"c{expert}"),), by_information=(token(f"i{expert}", 0.25),))
            if share
            else ExpertTokens(by_count=(), by_information=())
            for expert, share in enumerate(one.load)
        )
        for one in loads
    )
    return GroupRouting(name=name, examples=20, skipped=skipped, truncated=0, loads=loads, tokens=tokens)


def test_shift_is_the_share_of_choices_that_move() -> None:
    assert shift(load((0.5, 0.5)), load((0.5, 0.5))) == 0
    assert shift(load((1.0, 0.0)), load((0.0, 1.0))) == 1
    assert shift(load((0.5, 0.3, 0.2)), load((0.2, 0.4, 0.4))) == pytest.approx(0.3)


def test_table_of_groups() -> None:
    whole = group("all data", load((0.5, 0.5)), load((0.5, 0.5), layer=3), load((0.5, 0.5), "decoder"))
    first = group("de", load((0.75, 0.25)), load((0.5, 0.5), layer=3), load((1.0, 0.0), "decoder", tokens=7))
    assert format_groups([whole, first]).splitlines() == [
        "group  stack    examples  tokens  MaxVio  dead  entropy  shift",
        "de     encoder        20  10,000    0.25     0     1.50  12.5%",
        "de     decoder        20       7    1.00     1     1.50  50.0%",
    ]


def test_table_of_tokens() -> None:
    assert format_tokens(group("g", load((0.6, 0.4, 0.0)))).splitlines() == [
        "stack    layer  expert   load  tokens",
        "encoder      1       0  60.0%  i0 25%",
        "encoder      1       1  40.0%  i1 25%",
        "encoder      1       2   0.0%  dead: no token",
    ]


def test_tokens_of_many_experts_are_shortened_to_the_last_layers() -> None:
    uniform = (1 / 32,) * 32
    loads = [load(uniform, stack, layer) for stack in ("encoder", "decoder") for layer in (1, 3)]
    lines = format_tokens(group("g", *loads)).splitlines()
    assert {tuple(line.split()[:2]) for line in lines[1:-1]} == {("encoder", "3"), ("decoder", "3")}
    assert len(lines) == 1 + 64 + 1
    assert "other layers" in lines[-1]
    assert len(format_tokens(group("g", *loads[:2])).splitlines()) == 1 + 64, "64 lines fit"


def test_warnings_name_dead_experts() -> None:
    found = group("all data", load((0.5, 0.5, 0.0)), load((0.4, 0.3, 0.3)), load((1.0, 0.0, 0.0), "decoder", 3, 99))
    first, second = dead_expert_warnings(found)
    assert first == "encoder layer 1: 1 of 3 experts are dead (2): none of 10,000 tokens chose them"
    assert second.startswith(
        "decoder layer 3: 2 of 3 experts are dead (1, 2): none of 99 tokens chose them. With more"
    )


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = group("all data", load((1.0, 0.0))), group("de", load((1.0, 0.0)))
    show([whole, part], ["something to know"])
    output, error = capsys.readouterr()
    assert "all data: 20 examples" in output
    assert "shift" in output
    assert "dead: no token" in output
    assert error.splitlines()[0] == "note: something to know"
    assert error.splitlines()[1].startswith("warning: encoder layer 1: 1 of 2 experts are dead (1)")
    show([whole])
    assert "shift" not in capsys.readouterr().out, "one group needs no comparison"


def test_files(tmp_path: Path) -> None:
    config = SparseqConfig(num_experts=4)
    whole = group("all data", load((0.5, 0.5, 0.0, 0.0)))
    files = write(tmp_path, "my/model", config, [whole], ["something to know"])
    assert [path.name for path in files] == ["experts.json", "experts.html", "experts.png"]
    assert all(path.stat().st_size for path in files)
    report = json.loads(files[0].read_text("utf-8"))
    assert (report["checkpoint"], report["model"]["num_experts"]) == ("my/model", 4)
    assert report["groups"] == [json.loads(json.dumps(whole.to_dict()))]
    assert (report["notes"], len(report["warnings"])) == (["something to know"], 1)
    page = files[1].read_text("utf-8")
    assert "Note: something to know." in page
    assert "the first is the start token" not in page, "no decoder is shown"
