"""``draw_net``: a picture of a net, by graphviz if that is installed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from soonest.caffe.files import replaced
from soonest.caffe.io import prototxt
from soonest.caffe.net import rules
from soonest.caffe.proto.message import Message

COLORS = {
    "Convolution": "#FF5050", "Deconvolution": "#FF5050", "Pooling": "#FF9900",
    "InnerProduct": "#CC33FF",
}  # fmt: skip
"""As in Caffe's own pictures; other layers are blue, blobs are grey."""
_LAYER, _BLOB = "#6495ED", "#E0E0E0"
_ACROSS, _DOWN, _HEIGHT, _LETTER = 40, 34, 40, 7


@dataclass
class Node:
    """A layer, or a blob between layers.

    Attributes:
        lines: of text in it.
        color: of its box.
        is_blob: whether it is a blob.
        after: which nodes it hangs on, by their numbers.
        rank: in which row it is.
    """

    lines: list[str]
    color: str
    is_blob: bool = False
    after: list[tuple[int, str]] = field(default_factory=list)
    rank: int = 0


def draw(source: str, target: str, *, rankdir: str = "LR", phase: str = "ALL") -> None:
    """Writes a picture.

    Args:
        source: the definition of a net.
        target: the picture: ``.svg`` and ``.dot`` always, others if graphviz is installed.
        rankdir: ``LR`` from left to right, ``TB`` from top to bottom; also ``RL`` and ``BT``.
        phase: whose layers are drawn, ``TRAIN``, ``TEST`` or ``ALL``.

    Raises:
        ValueError: it cannot be read, drawn or written.
    """
    draw_definition(
        prototxt.read_net(source), target, rankdir=rankdir, phase=phase, name=Path(source).stem
    )


def draw_definition(
    net: Message, target: str, *, rankdir: str = "LR", phase: str = "ALL", name: str = "net"
) -> None:
    """Writes a picture of a ``NetParameter`` in today's form; see ``draw``.

    Args:
        net: to draw.
        target: the picture.
        rankdir: in which direction.
        phase: whose layers are drawn.
        name: of the net, if it has none.

    Raises:
        ValueError: it cannot be drawn or written.
    """
    layers = list(net.layer)
    if phase != "ALL":
        layers = rules.chosen(net, Message("NetState", phase=phase))
    nodes = graph(layers)
    kind = Path(target).suffix.lstrip(".").lower()
    dot = to_dot(nodes, net.name or name, rankdir)
    if kind == "dot":
        _write(target, dot.encode())
    elif shutil.which("dot"):
        _write(target, _by_graphviz(dot, kind))
    elif kind == "svg":
        _write(target, to_svg(nodes, sideways=rankdir in ("LR", "RL")).encode())
    else:
        raise ValueError(
            f"without graphviz only .svg and .dot can be written, not {target}: install graphviz, "
            "or name an .svg"
        )


def graph(layers: list[Message]) -> list[Node]:
    """Layers and blobs, each after those that it hangs on.

    A layer that works in place is a node of its own, between the blob and who reads that later.
    """
    nodes: list[Node] = []
    makers: dict[str, int] = {}
    blobs: dict[str, int] = {}
    for layer in layers:
        node = Node([layer.name, f"({layer.type})", *_settings(layer)],
                    COLORS.get(layer.type, _LAYER))  # fmt: skip
        node.after = [(makers[name], "") for name in layer.bottom if name in makers]
        nodes.append(node)
        number = len(nodes) - 1
        for name in layer.top:
            if name in layer.bottom:
                makers[name] = number
                continue
            if name in blobs:  # Another phase has another layer for it.
                nodes[blobs[name]].after.append((number, _size(layer)))
                continue
            nodes.append(Node([name], _BLOB, is_blob=True, after=[(number, _size(layer))]))
            makers[name] = blobs[name] = len(nodes) - 1
    for node in nodes:
        node.rank = 1 + max((nodes[one].rank for one, _ in node.after), default=-1)
    return nodes


def _settings(layer: Message) -> list[str]:
    if layer.type in ("Convolution", "Deconvolution"):
        own = layer.convolution_param
        kernel = list(own.kernel_size) or [own.kernel_h, own.kernel_w]
        return [
            f"kernel size: {_listed(kernel)}",
            f"stride: {_listed(list(own.stride) or [1])}",
            f"pad: {_listed(list(own.pad) or [0])}",
        ]
    if layer.type == "Pooling":
        own = layer.pooling_param
        size = "all" if own.global_pooling else str(own.kernel_size)
        return [f"{own.pool} of {size}", f"stride: {own.stride}", f"pad: {own.pad}"]
    return []


def _listed(values: list[int]) -> str:
    return " x ".join(map(str, values))


def _size(layer: Message) -> str:
    """What an arrow from a layer says: how many channels leave it."""
    if layer.type in ("Convolution", "Deconvolution"):
        return str(layer.convolution_param.num_output)
    return str(layer.inner_product_param.num_output) if layer.type == "InnerProduct" else ""


def to_dot(nodes: list[Node], name: str, rankdir: str) -> str:
    """The net in the language of graphviz."""
    lines = [f"digraph {_quoted([name])} {{", f"rankdir={rankdir};"]
    for number, node in enumerate(nodes):
        shape = "octagon" if node.is_blob else "record"
        shape = "box" if shape == "record" else shape
        lines.append(
            f"n{number} [label={_quoted(node.lines)}, shape={shape}, style=filled, "
            f'fillcolor="{node.color}"];'
        )
        lines += [f"n{one} -> n{number} [label={_quoted([text])}];" for one, text in node.after]
    return "\n".join([*lines, "}", ""])


def _quoted(lines: list[str]) -> str:
    text = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return f'"{text}"'


def _by_graphviz(dot: str, kind: str) -> bytes:
    done = subprocess.run(["dot", f"-T{kind}"], input=dot.encode(), capture_output=True)
    if done.returncode:
        raise ValueError(f"graphviz: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def to_svg(nodes: list[Node], *, sideways: bool) -> str:
    """The net as a picture, a row or a column for each step from the data."""
    widths = [_LETTER * max(map(len, node.lines)) + 16 for node in nodes]
    heights = [max(_HEIGHT, 16 * len(node.lines) + 12) for node in nodes]
    ranks: dict[int, list[int]] = {}
    for number, node in enumerate(nodes):
        ranks.setdefault(node.rank, []).append(number)
    along, across = (widths, heights) if sideways else (heights, widths)
    centres: dict[int, tuple[float, float]] = {}
    start = far = 10.0
    for rank in sorted(ranks):
        thick = max(along[number] for number in ranks[rank])
        place = 10.0
        for number in ranks[rank]:
            x, y = start + thick / 2, place + across[number] / 2
            centres[number] = (x, y) if sideways else (y, x)
            place += across[number] + _DOWN
        far = max(far, place)
        start += thick + _ACROSS
    width, height = (start, far) if sideways else (far, start)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for number, node in enumerate(nodes):
        x, y = centres[number]
        for one, text in node.after:
            parts.append(_arrow(centres[one], (widths[one], heights[one]), (x, y),
                                (widths[number], heights[number]), text, sideways))  # fmt: skip
        parts.append(_box(node, x, y, widths[number], heights[number]))
    return "\n".join([*parts, "</svg>", ""])


def _box(node: Node, x: float, y: float, width: int, height: int) -> str:
    first = y - 8 * (len(node.lines) - 1) + 4
    text = "".join(
        f'<text x="{x:g}" y="{first + 16 * place:g}">{escape(line)}</text>'
        for place, line in enumerate(node.lines)
    )
    return (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" '
        f'rx="{12 if node.is_blob else 0}" fill="{node.color}" stroke="black"/>{text}'
    )


def _arrow(
    start: tuple[float, float],
    start_size: tuple[int, int],
    stop: tuple[float, float],
    stop_size: tuple[int, int],
    text: str,
    sideways: bool,
) -> str:
    axis = 0 if sideways else 1
    ends = [list(start), list(stop)]
    ends[0][axis] += start_size[axis] / 2
    ends[1][axis] -= stop_size[axis] / 2
    (x, y), (u, v) = ends
    bend = f"{(x + u) / 2:g} {y:g} {(x + u) / 2:g} {v:g}"
    if not sideways:
        bend = f"{x:g} {(y + v) / 2:g} {u:g} {(y + v) / 2:g}"
    label = f'<text x="{(x + u) / 2:g}" y="{(y + v) / 2 - 3:g}">{text}</text>' if text else ""
    return (
        f'<path d="M{x:g} {y:g}C{bend} {u:g} {v:g}" fill="none" stroke="black" '
        f'marker-end="url(#tip)"/>{label}'
    )


def _write(target: str, data: bytes) -> None:
    with replaced(target) as new:
        new.write_bytes(data)
