"""What `sparseq inspect experts` found, as one HTML file that needs nothing else: no network, no script."""

from collections.abc import Sequence
from html import escape

from sparseq.inspection.experts import LayerLoad
from sparseq.inspection.survey import GroupRouting
from sparseq.inspection.tokens import ExpertTokens, TokenShare

# More experts than this leave no room for a number in a cell; it stays in the tooltip.
_MAX_NUMBERS = 16

# Cells are a red (above the uniform share) or a blue (below it) laid over the page's own background, so that the
# uniform share is white on a light page and dark on a dark one.
_ABOVE, _BELOW = "178 24 43", "33 102 172"

# From this distance to the uniform share, white text is read more easily than the page's own colour.
_STRONG = 0.55

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
details { margin: .4rem 0; } summary { cursor: pointer; }
details.group { border: 1px solid rgb(128 128 128 / .4); border-radius: 6px; padding: .5rem .9rem; }
details.group > summary { font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-weight: 500; text-align: left; padding: .1rem .5rem; white-space: nowrap; }
.heat td, .heat thead th { text-align: center; font-size: 12px; }
.heat td.cell { min-width: 7px; height: 1.6rem; padding: 0; border: 1px solid rgb(128 128 128 / .18); }
.heat.numbers td.cell { min-width: 2.4rem; }
.heat td.strong { color: #fff; }
td.dead, .swatch.dead { outline: 2px solid #f80; outline-offset: -2px; }
.heat td.measure { padding: 0 .5rem; font-variant-numeric: tabular-nums; }
.swatch { padding: 0 .5em; }
.heat tr.next-stack > * { border-top: 2px solid rgb(128 128 128 / .9); }
.tokens td, .tokens th { padding: .15rem .6rem; vertical-align: top; border-top: 1px solid rgb(128 128 128 / .25); }
.tokens code { background: rgb(128 128 128 / .15); border-radius: 3px; padding: 0 .25em; white-space: pre-wrap; }
.tokens span { white-space: nowrap; margin-right: .5em; }
small, .note { opacity: .75; }
.warning { border-left: 4px solid #c60; padding-left: .7rem; }
"""


def render_page(title: str, groups: Sequence[GroupRouting], *, notes: Sequence[str] = (), top_k: int) -> str:
    """The page: for each group a heat map of layers x experts with tooltips, and the tokens of each expert.

    Args:
        title: Heading, such as the name of the checkpoint.
        groups: From `inspect_experts`; the first is shown opened.
        notes: Sentences for the top of the page.
        top_k: K, experts that each token chooses.

    Returns:
        A complete HTML document. Nothing in it refers to another file or to the network.
    """
    sections = "\n".join(_group(group, top_k, is_open=place == 0) for place, group in enumerate(groups))
    remarks = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Experts of {escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Experts of {escape(title)}</h1>
{remarks}
<p class="note">A cell is the load of one expert relative to the uniform share 1/E: {_swatch(0.0, "0")}
{_swatch(0.5, "0.5")} {_swatch(1.0, "1")} {_swatch(1.5, "1.5")} {_swatch(2.0, "2 and more")}. An outlined cell
{_swatch(0.0, "x", "swatch dead")} is a dead expert: no token chose it. Point at a cell for its numbers.</p>
{sections}
</body>
</html>
"""


def _group(group: GroupRouting, top_k: int, *, is_open: bool) -> str:
    dead = [load for load in group.loads if load.dead_experts]
    warning = ""
    if dead:
        named = "; ".join(
            f"{load.stack} layer {load.layer}: {', '.join(map(str, load.dead_experts))}" for load in dead
        )
        warning = f'<p class="warning">Dead experts, which no token chose: {named}.</p>'
    layers = "\n".join(_token_table(load, experts) for load, experts in zip(group.loads, group.tokens, strict=True))
    return f"""<details class="group" name="group"{" open" if is_open else ""}>
<summary>{escape(group.name)} <small>({group.examples:,} examples)</small></summary>
{warning}
<div class="wide">
{_heat_map(group, top_k)}
</div>
<h2>Tokens that each expert takes most</h2>
{layers}
</details>"""


def _heat_map(group: GroupRouting, top_k: int) -> str:
    experts = len(group.loads[0].load)
    has_numbers = experts <= _MAX_NUMBERS
    # A label every so many experts, where there is no room for all.
    step = 1 if has_numbers else 8
    labels = "".join(f'<th colspan="{min(step, experts - first)}">{first}</th>' for first in range(0, experts, step))
    rows = []
    for place, (load, tokens) in enumerate(zip(group.loads, group.tokens, strict=True)):
        is_next = place > 0 and load.stack != group.loads[place - 1].stack
        cells = "".join(
            _cell(load, expert, tokens[expert], top_k, has_numbers=has_numbers) for expert in range(experts)
        )
        measures = (
            f"{load.max_violation:.2f}",
            f"{len(load.dead_experts)}",
            f"{load.router_entropy:.2f}",
            f"{load.mean_top1_probability:.2f}",
            f"{load.tokens:,}",
        )
        rows.append(
            f'<tr class="{"next-stack" if is_next else "layer"}"><th scope="row">{load.stack} {load.layer}</th>{cells}'
            + "".join(f'<td class="measure">{measure}</td>' for measure in measures)
            + "</tr>"
        )
    heads = "".join(f"<th>{name}</th>" for name in ("MaxVio", "dead", "entropy", "top-1", "tokens"))
    body = "\n".join(rows)
    return f"""<table class="heat{" numbers" if has_numbers else ""}">
<thead><tr><th>expert</th>{labels}{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>"""


def _cell(load: LayerLoad, expert: int, tokens: ExpertTokens, top_k: int, *, has_numbers: bool) -> str:
    share = load.load[expert]
    relative = share * len(load.load)
    # Each token chooses K experts, so that there are K times as many choices as tokens.
    lines = [
        f"{load.stack} layer {load.layer}, expert {expert}",
        f"{share:.2%} of the choices, {relative:.2f} times the uniform share",
        f"{round(share * load.tokens * top_k):,} of {load.tokens:,} tokens",
    ]
    takes = tokens.by_information or tokens.by_count
    if takes:
        lines.append("takes " + " ".join(token.token for token in takes[:5]))
    classes = ["cell"]
    if share == 0:
        classes.append("dead")
    if abs(relative - 1) > _STRONG:
        classes.append("strong")
    text = "x" if share == 0 else f"{relative:.1f}" if has_numbers else ""
    tip = escape("\n".join(lines)).replace("\n", "&#10;")
    return f'<td class="{" ".join(classes)}" style="background:{_color(relative)}" title="{tip}">{text}</td>'


def _token_table(load: LayerLoad, experts: Sequence[ExpertTokens]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{expert}</th><td>{load.load[expert]:.1%}</td>'
        f"<td>{_tokens(tokens.by_information)}</td><td>{_tokens(tokens.by_count)}</td></tr>"
        for expert, tokens in enumerate(experts)
    )
    return f"""<details>
<summary>{load.stack} layer {load.layer}</summary>
<div class="wide"><table class="tokens">
<thead><tr><th>expert</th><th>load</th>
<th>most telling <small>(share of the token's occurrences · how often)</small></th><th>most often</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</details>"""


def _tokens(tokens: Sequence[TokenShare]) -> str:
    return " ".join(
        f'<span title="{token.count:,} of {token.occurrences:,} occurrences, id {token.id}">'
        f"<code><bdi>{escape(token.token)}</bdi></code>&nbsp;<small>{token.share:.0%} · {token.count:,}</small></span>"
        for token in tokens
    )


def _color(relative: float) -> str:
    strength = min(abs(relative - 1), 1)
    return f"rgb({_ABOVE if relative > 1 else _BELOW} / {strength:.2f})"


def _swatch(relative: float, label: str, classes: str = "swatch") -> str:
    ink = ";color:#fff" if abs(relative - 1) > _STRONG else ""
    return f'<span class="{classes}" style="background:{_color(relative)}{ink}">{label}</span>'


__all__ = ["render_page"]
