"""The page of `ops report --html`: what changes as a tree of components and resources, coloured by what happens to them.

The picture is SVG within the page; nothing is loaded from elsewhere, and there is no script.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ops.report import Change, Preview, Verdict, by_verdict, judged, title

COLUMN, ROW, WIDTH, HEIGHT = 330, 56, 290, 42  # pixels
COLOURS: Mapping[str, str] = {
    "create": "#c9ecd0",
    "update": "#fdeeb8",
    "replace": "#fbd3a5",
    "delete": "#f3b6b6",
    "would lose data": "#d0453e",
    "": "#e9ebee",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1150px; padding: 0 1rem; color: #1d2126; }
li { margin: .2rem 0; } pre { background: #f5f5f5; padding: 1rem; overflow: auto; } code { background: #f1f2f4; }
.legend span { display: inline-block; padding: .1rem .6rem; margin-right: .4rem; border-radius: 4px; }
.picture { overflow: auto; }
"""


@dataclass
class Node:
    """A component or a resource in the picture."""

    name: str
    kind: str
    operation: str = ""
    """What happens to it; nothing for a component, which is there to hold others together."""
    loses_data: bool = False
    children: list["Node"] = field(default_factory=list)


def page(stack: str, preview: Preview) -> str:
    """Return the whole page."""
    heading = title(stack, preview)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head><body><h1>{escape(heading)}</h1>",
        *(f"<pre>{escape(error)}</pre>" for error in preview.errors),
        *(f"<p>Refused by policies: {escape(refusal)}</p>" for refusal in preview.refusals),
        *_sentences(preview),
    ]
    if preview.changes:
        legend = "".join(
            f'<span style="background:{colour};color:{_ink(word)}">{word}</span>' for word, colour in COLOURS.items() if word
        )
        parts += [f'<p class="legend">{legend}</p>', f'<div class="picture">{_picture(_tree(preview.changes))}</div>']
    parts += [f"<p>{preview.unchanged} unchanged</p>", "</body></html>"]
    return "\n".join(parts) + "\n"


def _sentences(preview: Preview) -> Iterator[str]:
    for heading, changes in by_verdict(preview).items():
        # What needs nobody's eyes is in the picture.
        if heading != "Further":
            lines = (
                f"<li>{change.operation} <code>{escape(change.name)}</code>: {escape(words)}</li>" for change, words in changes
            )
            yield f"<h2>{heading}</h2><ul>{''.join(lines)}</ul>"


def _ink(word: str) -> str:
    return "#ffffff" if word == "would lose data" else "#1d2126"


def _tree(changes: Sequence[Change]) -> list[Node]:
    """Return the changes below the components that they are of."""
    nodes: dict[str, Node] = {}
    tops: list[Node] = []
    for change in changes:
        node = Node(change.name, change.kind, change.operation, loses_data=judged(change)[0] is Verdict.LOSES_DATA)
        if not change.parent:
            tops.append(node)
            continue
        if change.parent not in nodes:
            kind = change.parent.split("::")[2].rpartition(":")[2]
            nodes[change.parent] = Node(change.parent.rpartition("::")[2], kind)
            tops.append(nodes[change.parent])
        nodes[change.parent].children.append(node)
    return tops


def _picture(tops: Sequence[Node]) -> str:
    """Draw the trees from left to right, each node beside the middle of its children."""
    drawn: list[str] = []
    rows = 0

    def draw(node: Node, depth: int) -> float:
        nonlocal rows
        places = [draw(child, depth + 1) for child in node.children]
        if places:
            top = sum(places) / len(places)
        else:
            top = rows * ROW + 8.0
            rows += 1
        left = depth * COLUMN + 8
        drawn.extend(_edge(left + WIDTH, top + HEIGHT / 2, left + COLUMN, place + HEIGHT / 2) for place in places)
        drawn.append(_box(node, left, top))
        return top

    for node in tops:
        draw(node, 0)
    columns = 2 if any(node.children for node in tops) else 1
    size = f'width="{columns * COLUMN}" height="{rows * ROW + 16}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="what changes">{"".join(drawn)}</svg>'


def _edge(left: float, top: float, right: float, bottom: float) -> str:
    middle = (left + right) / 2
    path = f"M{left},{top} C{middle},{top} {middle},{bottom} {right},{bottom}"
    return f'<path d="{path}" fill="none" stroke="#9aa1ab"/>'


def _box(node: Node, left: float, top: float) -> str:
    colour = Verdict.LOSES_DATA.words if node.loses_data else node.operation
    ink = _ink(colour)
    second = f"{node.operation} {node.kind}".strip() + (f": {Verdict.LOSES_DATA.words}" if node.loses_data else "")
    return (
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{COLOURS.get(colour, COLOURS[""])}"/>'
        f'<text x="{left + 10}" y="{top + 18}" font-family="sans-serif" font-size="13" font-weight="600" fill="{ink}">'
        f"{escape(node.name)}</text>"
        f'<text x="{left + 10}" y="{top + 34}" font-family="sans-serif" font-size="11" fill="{ink}">{escape(second)}</text>'
    )
