"""Diagrams as SVG, drawn while the site is built: no script in the page, no browser at build time, no network.

A diagram is written in Mermaid's language, which GitHub and JupyterLab draw by themselves. Mermaid itself would be 2.5 MB
of minified script in git and on every page; its ports to PyPI are young, or start a browser. The site holds graphs alone,
so the part of the language that says a graph is read here: `graph` and `flowchart` (TB, TD, LR) with boxes and arrows, and
`stateDiagram-v2` with transitions. Another line is an error that names it.

The layout is Sugiyama's, in layers: arrows that close a cycle are turned around, layers follow the longest path, an arrow
is a chain of points with its label among them, and the layers are ordered by the mean place of the neighbours.
"""

import re
from dataclasses import dataclass, field
from html import escape

NODE = r"([\w.-]+|\[\*\])"
BOX = re.compile(NODE + r'\["([^"]*)"\](?::::([\w-]+))?')
ARROW = re.compile(NODE + r"\s*-->\s*(?:\|([^|]*)\|\s*)?" + NODE)
TRANSITION = re.compile(NODE + r"\s*-->\s*" + NODE + r"(?:\s*:\s*(.*))?")
WIDE, LINE = 7.2, 17  # of a letter, of a line
PAD, GAP, ROW = 10, 22, 14  # around the words of a box, between neighbours, between rows
SWEEPS = 24


@dataclass
class Graph:
    "What a diagram says: boxes with their words, arrows with theirs, and whether it runs from left to right."

    across: bool = False
    boxes: dict[str, list[str]] = field(default_factory=dict)
    arrows: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def arrow(self, a: str, b: str, words: str | None) -> None:
        if a == b:
            raise ValueError(f"{a} --> {b}: the site draws no arrow from a box to itself")
        for n in (a, b):
            self.boxes.setdefault(n, [n])
        self.arrows.append((a, b, folded(words or "")))


def folded(words: str, width: int = 24) -> list[str]:
    "Words in lines of about `width` letters, so that a long label does not push its neighbours away."
    lines: list[str] = []
    for w in words.split():
        lines[-1:] = [f"{lines[-1]} {w}"] if lines and len(lines[-1]) + len(w) < width else [*lines[-1:], w]
    return lines


def read_graph(text: str) -> Graph:
    "A diagram in Mermaid's language; raises `ValueError` with the first line that says something else than a graph."
    head, *rest = [s.strip() for s in text.strip().splitlines()]
    kind, _, way = head.partition(" ")
    if (kind, way) not in [(k, w) for k in ("graph", "flowchart") for w in ("TB", "TD", "LR")] + [
        ("stateDiagram-v2", "")
    ]:
        raise ValueError(f"{head!r}: the site draws `graph` and `flowchart`, TB, TD or LR, and `stateDiagram-v2`")
    graph = Graph(across=way == "LR")
    for line in filter(None, rest):
        if m := BOX.fullmatch(line):
            graph.boxes[m[1]] = m[2].split("<br/>")
        elif kind == "stateDiagram-v2" and (m := TRANSITION.fullmatch(line)):
            graph.arrow(m[1], m[2], m[3])
        elif kind != "stateDiagram-v2" and (m := ARROW.fullmatch(line)):
            graph.arrow(m[1], m[3], m[2])
        elif not line.startswith(("%%", "classDef ")):
            raise ValueError(f"{line!r}: the site draws boxes and arrows alone; write it as those, or teach {__name__}")
    return graph


def layers(graph: Graph) -> tuple[dict[str, int], set[int]]:
    "The layer of each box, and the arrows that close a cycle."
    out: dict[str, list[int]] = {n: [] for n in graph.boxes}
    for i, (a, _, _) in enumerate(graph.arrows):
        out[a].append(i)
    back, done, open_ = set(), [], set()

    def visit(n: str) -> None:
        open_.add(n)
        for i in out[n]:
            b = graph.arrows[i][1]
            if b in open_:
                back.add(i)
            elif b not in done:
                visit(b)
        open_.remove(n)
        done.append(n)

    for n in graph.boxes:
        if n not in done:
            visit(n)
    layer = dict.fromkeys(graph.boxes, 0)
    for n in reversed(done):  # in the order of the arrows
        for i in out[n]:
            if i not in back:
                layer[graph.arrows[i][1]] = max(layer[graph.arrows[i][1]], layer[n] + 1)
    return layer, back


def spread(wanted: list[float], sizes: list[float]) -> list[float]:
    "Places near the wanted ones, in the same order, that leave the gap between any two."
    apart = [(a + b) / 2 + GAP for a, b in zip(sizes, sizes[1:], strict=False)]
    right, left = [*wanted], [*wanted]
    for i, d in enumerate(apart):
        right[i + 1] = max(right[i + 1], right[i] + d)
    for i, d in reversed([*enumerate(apart)]):
        left[i] = min(left[i], left[i + 1] - d)
    return [(a + b) / 2 for a, b in zip(left, right, strict=True)]


@dataclass
class Point:
    "A box, or a place that an arrow passes, perhaps with its label: its words, its size and where it lies."

    words: list[str]
    box: bool
    next_to: list["Point"] = field(default_factory=list)
    x: float = 0
    y: float = 0

    @property
    def size(self) -> tuple[float, float]:
        wide, pad = WIDE * max(map(len, self.words), default=0), PAD if self.box else 0
        return (16, 16) if self.words == ["[*]"] else (wide + 2 * pad, LINE * len(self.words) + pad)


def placed(graph: Graph) -> tuple[dict[str, Point], list[list[Point]], tuple[float, float]]:
    "The boxes, for each arrow the points from its start to its end, and the width and height of it all."
    layer, back = layers(graph)
    boxes = {n: Point(words, True) for n, words in graph.boxes.items()}
    rows: list[list[Point]] = [[] for _ in range(2 * max(layer.values(), default=0) + 1)]  # between two layers: labels
    for n, p in boxes.items():
        rows[2 * layer[n]].append(p)
    paths = []
    for i, (a, b, words) in enumerate(graph.arrows):
        first, last = (b, a) if i in back else (a, b)
        between = range(2 * layer[first] + 1, 2 * layer[last])
        chain = [Point(words if k == (len(between) - 1) // 4 * 2 else [], False) for k in range(len(between))]
        for r, p in zip(between, chain, strict=True):
            rows[r].append(p)
        path = [boxes[first], *chain, boxes[last]]
        for p, q in zip(path, path[1:], strict=False):
            p.next_to.append(q)
            q.next_to.append(p)
        paths.append(path[::-1] if i in back else path)
    side = 1 if graph.across else 0
    for row in rows:
        for i, p in enumerate(row):
            p.x = i
    row_of = {id(p): r for r, row in enumerate(rows) for p in row}
    for sweep in range(SWEEPS):  # the order in a row, downwards by the row above and upwards by the row below
        for r in range(len(rows))[:: -1 if sweep % 2 else 1]:
            for p in rows[r]:
                seen = [q.x for q in p.next_to if (row_of[id(q)] < r) == (sweep % 2 == 0)]
                p.y = sum(seen) / len(seen) if seen else p.x
            rows[r].sort(key=lambda p: p.y)
            for i, p in enumerate(rows[r]):
                p.x = i
    for row in rows:
        for p, x in zip(row, spread([0.0] * len(row), [p.size[side] for p in row]), strict=True):
            p.x = x
    for sweep in range(SWEEPS):  # the places
        for row in rows[:: -1 if sweep % 2 else 1]:
            wanted = [sum(q.x for q in p.next_to) / len(p.next_to) if p.next_to else p.x for p in row]
            for p, x in zip(row, spread(wanted, [p.size[side] for p in row]), strict=True):
                p.x = x
    left, depth = min(p.x - p.size[side] / 2 for row in rows for p in row) - 2, 2.0
    for row in rows:
        thick = max(p.size[1 - side] for p in row)
        for p in row:
            p.x, p.y = p.x - left, depth + thick / 2
        depth += thick + ROW
    breadth = max(p.x + p.size[side] / 2 for row in rows for p in row) + 2
    if graph.across:
        for row in rows:
            for p in row:
                p.x, p.y = p.y, p.x
    return boxes, paths, (depth - ROW + 2, breadth) if graph.across else (breadth, depth - ROW + 2)


def curve(path: list[Point], across: bool) -> str:
    "The line of an arrow, from the edge of one box to the edge of another."
    places = [(p.y, p.x) if across else (p.x, p.y) for p in path]
    for end, near in ((0, 1), (-1, -2)):
        (x, y), (u, v), (wide, high) = places[end], places[near], path[end].size[:: -1 if across else 1]
        places[end] = (x + max(-wide / 3, min(wide / 3, (u - x) / 2)), y + (high if v > y else -high) / 2)
    steps = [f"M{_at(*places[0], across)}"]
    for (x, y), (u, v) in zip(places, places[1:], strict=False):
        steps.append(f"C{_at(x, (y + v) / 2, across)} {_at(u, (y + v) / 2, across)} {_at(u, v, across)}")
    return "".join(steps)


def _at(x: float, y: float, across: bool) -> str:
    return f"{y:.1f} {x:.1f}" if across else f"{x:.1f} {y:.1f}"


def text(p: Point) -> str:
    "The words of a point, line under line."
    top = p.y - LINE * (len(p.words) - 1) / 2 + 4.5
    kind = "name" if p.box else "label"
    words = [f'<tspan x="{p.x:.1f}" y="{top + LINE * i:.1f}">{escape(w)}</tspan>' for i, w in enumerate(p.words)]
    return f'<text class="{kind}">' + "".join(words) + "</text>" if words else ""


def box(p: Point) -> str:
    "A box with its words; a dot for where a state diagram begins or ends."
    if p.words == ["[*]"]:
        return f'<circle cx="{p.x:.1f}" cy="{p.y:.1f}" r="7"/>'
    wide, high = p.size
    place = f'x="{p.x - wide / 2:.1f}" y="{p.y - high / 2:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    return f'<rect {place} rx="5"/>{text(p)}'


TIP = (
    '<defs><marker id="diagram-tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"'
    ' orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
)


def drawn(source: str) -> str:
    "A diagram in Mermaid's language as a figure of HTML, in one line: an empty line would end it in Markdown."
    graph = read_graph(source)
    boxes, paths, (wide, high) = placed(graph)
    lines = [f'<path d="{curve(p, graph.across)}" marker-end="url(#diagram-tip)"/>' for p in paths]
    labels = [text(p) for path in paths for p in path if not p.box]
    said = "; ".join(f"{a} to {b}{': ' * bool(w)}{' '.join(w)}" for a, b, w in graph.arrows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(said)}"'
    head += f' width="{wide:.0f}" height="{high:.0f}" viewBox="0 0 {wide:.0f} {high:.0f}">'
    parts = "".join([head, TIP, *lines, *map(box, boxes.values()), *labels, "</svg>"])
    return f'<figure class="diagram">{parts}</figure>'
