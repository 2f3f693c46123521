"""The HTML page: one complete file, every cell in it, and nothing that text could break."""

import re
from html.parser import HTMLParser

import pytest

from sparseq.inspection.page import render_page
from sparseq.inspection.routing import LayerLoad
from sparseq.inspection.survey import GroupRouting
from sparseq.inspection.tokens import ExpertTokens, TokenShare

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {[tag for tag, _, _ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [""])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        opened = self._open.pop()
        assert opened[0] == tag, f"</{tag}> closes <{opened[0]}>"

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text[0] += data

    def find(self, tag: str, css_class: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, text[0])
            for name, attributes, text in self.elements
            if name == tag and (not css_class or css_class in (attributes.get("class") or "").split())
        ]


def token(text: str, count: int = 3, occurrences: int = 4) -> TokenShare:
    return TokenShare(id=7, token=text, count=count, occurrences=occurrences, information=1.0)


def group(name: str, experts: int, layers: int = 2, dead: int | None = None, text: str = "▁dog") -> GroupRouting:
    weights = [0.0 if expert == dead else 1.0 + expert for expert in range(experts)]
    loads = tuple(
        LayerLoad(
            stack=stack,
            layer=2 * layer + 1,
            tokens=100,
            load=tuple(weight / sum(weights) for weight in weights),
            router_entropy=1.25,
            mean_top1_probability=0.5,
        )
        for stack in ("encoder", "decoder")
        for layer in range(layers)
    )
    tokens = tuple(
        ExpertTokens(by_count=(), by_information=())
        if expert == dead
        else ExpertTokens(by_count=(token(text),), by_information=(token(text),))
        for expert in range(experts)
    )
    return GroupRouting(name=name, examples=10, skipped=0, truncated=0, loads=loads, tokens=(tokens,) * len(loads))


@pytest.mark.parametrize("experts", [2, 8, 16, 17, 64, 128])
def test_every_cell_is_there_with_its_numbers(experts: int) -> None:
    groups = [group("all data", experts), group("de", experts, dead=1)]
    page = Page(render_page("my model", groups, top_k=2))
    cells = page.find("td", "cell")
    loads = [(load, expert) for one in groups for load in one.loads for expert in range(experts)]
    assert len(cells) == len(loads) == 2 * 4 * experts
    for (attributes, text), (load, expert) in zip(cells, loads, strict=True):
        share = load.load[expert]
        lines = (attributes["title"] or "").split("\n")
        assert lines[0] == f"{load.stack} layer {load.layer}, expert {expert}"
        assert lines[1] == f"{share:.2%} of the choices, {share * experts:.2f} times the uniform share"
        assert lines[2] == f"{round(share * 200)} of 100 tokens"
        is_dead = share == 0
        assert ("dead" in (attributes["class"] or "")) == is_dead
        assert len(lines) == (3 if is_dead else 4)
        assert text == ("x" if is_dead else f"{share * experts:.1f}" if experts <= 16 else "")
    # As many columns in the head as in each row: a label may span several.
    assert len(page.find("td", "measure")) == 5 * len(cells) // experts
    heads = [int(attributes.get("colspan") or 0) for attributes, _ in page.find("th") if "colspan" in attributes]
    assert sum(heads) == len(groups) * experts


def test_colors_are_centred_on_the_uniform_share() -> None:
    one = group("g", 4)
    (first, *_) = one.loads
    assert [share * 4 for share in first.load] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    cells = Page(render_page("m", [one], top_k=1)).find("td", "cell")[:4]
    colors = [re.fullmatch(r"background:rgb\((.+) / (.+)\)", attributes["style"] or "") for attributes, _ in cells]
    assert [float(color[2]) for color in colors if color] == pytest.approx([0.6, 0.2, 0.2, 0.6])
    hues = [color[1] for color in colors if color]
    assert hues[0] == hues[1] != hues[2] == hues[3]


def test_groups_can_be_switched() -> None:
    page = Page(render_page("m", [group("all data", 4), group("de", 4), group("fr", 4)], top_k=2))
    details = page.find("details", "group")
    assert ["open" in attributes for attributes, _ in details] == [True, False, False]
    # Elements of one name close each other.
    assert {attributes["name"] for attributes, _ in details} == {"group"}
    assert [text.split("(")[0].strip() for _, text in page.find("summary") if "examples" in text] == [
        "all data",
        "de",
        "fr",
    ]


def test_measures_and_dead_experts_are_named() -> None:
    page = Page(render_page("m", [group("g", 4, dead=2)], top_k=2))
    load = group("g", 4, dead=2).loads[0]
    measures = [text for _, text in page.find("td", "measure")][:5]
    assert measures == [f"{load.max_violation:.2f}", "1", "1.25", "0.50", "100"]
    ((_, warning),) = page.find("p", "warning")
    assert "encoder layer 1: 2; encoder layer 3: 2; decoder layer 1: 2; decoder layer 3: 2" in warning
    assert not Page(render_page("m", [group("g", 4)], top_k=2)).find("p", "warning")


def test_text_cannot_break_the_page() -> None:
    html = render_page(EVIL, [group(EVIL, 3, text=f'{EVIL}"&')], notes=[f"about {EVIL}"], top_k=2)
    assert "<script" not in html
    page = Page(html)
    assert page.find("h1")[0][1] == f"Experts of {EVIL}"
    assert any(text.startswith(EVIL) for _, text in page.find("summary"))
    assert any(text == f"about {EVIL}" for _, text in page.find("p", "note"))
    assert {text for _, text in page.find("code")} == {f'{EVIL}"&'}
    assert all((attributes["title"] or "").endswith(f'takes {EVIL}"&') for attributes, _ in page.find("td", "cell"))


def test_nothing_outside_is_referred_to() -> None:
    html = render_page("m", [group("g", 8, dead=0)], notes=["a note"], top_k=2)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    names = {name for _, attributes, _ in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "data", "action", "background"}
    assert not any(name.startswith("on") for name in names), "no event handlers"
    assert "url(" not in html
    assert "@import" not in html
    assert "//" not in html
    assert ("meta", {"charset": "utf-8"}) in [(tag, attributes) for tag, attributes, _ in page.elements]
    assert "color-scheme: light dark" in html
