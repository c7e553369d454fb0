"""Draws HGA inside a residual block as an SVG: `python docs/figures/draw_hga_block.py`."""

import pathlib
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 700
INK, GREY = "#1f2933", "#7b8794"
FILLS = {"plain": "#eef1f4", "hga": "#fde3c3", "stage": "#d6e8fa", "gate": "#dcf2dd"}


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "middle", style: str = "") -> str:
    """Returns one line of text with its baseline at y."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: list[str], fill: str) -> str:
    """Returns a box centred at (x, y): its first line in bold where there are more."""
    parts = [
        f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" rx="6" '
        f'fill="{FILLS[fill]}" stroke="{INK}"/>'
    ]
    top = y + 5 - 9 * (len(lines) - 1)
    for i, line in enumerate(lines):
        bold = 'font-weight="bold"' if i == 0 and len(lines) > 1 else ""
        parts.append(text(x, top + 18 * i, line, style=bold))
    return "\n".join(parts)


def arrow(*points: tuple[float, float]) -> str:
    """Returns a line through the points with a head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def circle(x: float, y: float, sign: str) -> str:
    """Returns a round node with a sign."""
    return f'<circle cx="{x}" cy="{y}" r="14" fill="white" stroke="{INK}"/>\n' + text(x, y + 6, sign, 18)


def residual_block() -> list[str]:
    """The left half: a bottleneck block with HGA after its last norm, before the sum."""
    x = 165
    parts = [text(x, 30, "Residual block", 17, style='font-weight="bold"'), text(x, 76, "input")]
    parts += [arrow((x, 84), (x, 133)), arrow((x, 105), (40, 105), (40, 516), (x - 15, 516))]
    rows = [
        (155, ["1x1 conv, BN, ReLU"], "plain"),
        (235, ["3x3 conv, BN, ReLU"], "plain"),
        (315, ["1x1 conv, BN"], "plain"),
        (415, ["HGA(A, 32, A)", "gates the A channels"], "hga"),
    ]
    for y, lines, fill in rows:
        parts.append(box(x, y, 190, 56 if len(lines) > 1 else 44, lines, fill))
    parts += [arrow((x, 177), (x, 212)), arrow((x, 257), (x, 292)), arrow((x, 337), (x, 386))]
    parts += [arrow((x, 443), (x, 501)), circle(x, 516, "+"), arrow((x, 530), (x, 567))]
    parts += [box(x, 590, 190, 44, ["ReLU"], "plain"), arrow((x, 612), (x, 655)), text(x, 674, "output")]
    parts.append(text(x + 8, 366, "y: H x W x A", 12, "start", f'fill="{GREY}"'))
    parts.append(text(34, 310, "shortcut", 12, style=f'fill="{GREY}" transform="rotate(-90 34 310)" dy="-4"'))
    return parts


def mechanism() -> list[str]:
    """The right half: what is inside HGA, and which part of it is linear."""
    x = 560
    parts = [text(x, 30, "HGA(A, 32, A)", 17, style='font-weight="bold"'), text(x, 60, "y: H x W x A")]
    parts += [arrow((x, 66), (x, 90)), box(x, 110, 230, 40, ["FC A to 32 at every position"], "hga")]
    parts.append(text(x, 175, "MFE: group convolutions, no bias, no activation", 13, style='font-weight="bold"'))
    columns = [(x - 165 + 110 * i, f"{k}x{k}") for i, k in enumerate((1, 3, 5, 7))]
    parts += [arrow((x, 130), (x, 160)), text(x + 10, 149, "z: H x W x 32", 12, "start", f'fill="{GREY}"')]
    for column, kernel in columns:
        parts += [box(column, 203, 90, 40, [kernel], "stage"), arrow((column, 223), (column, 257))]
    parts.append(text(x + 180, 246, "4 scales", 12, "start", f'fill="{GREY}"'))
    lines = ["HAP", "averages over 1x1, 2x2 and 4x4 grids: 21 cells"]
    parts += [box(x, 287, 430, 56, lines, "stage"), arrow((x, 315), (x, 352))]
    parts.append(text(x + 10, 338, "4 scales x 21 cells x 32", 12, "start", f'fill="{GREY}"'))
    lines = ["EE", "FC 21 x 32 to 8, the same for every scale, summed"]
    parts += [box(x, 382, 430, 56, lines, "stage"), arrow((x, 410), (x, 437))]
    parts += [box(x, 458, 230, 40, ["ReLU, FC 8 to 32"], "stage"), arrow((x, 478), (x, 502))]
    parts += [box(x, 523, 230, 40, ["FC 32 to A, sigmoid"], "gate"), arrow((x, 543), (x, 592))]
    parts.append(text(x + 10, 568, "s: one gate per channel", 12, "start", f'fill="{GREY}"'))
    parts += [circle(x, 607, "×"), arrow((x, 621), (x, 655)), text(x, 674, "y x s: H x W x A")]  # noqa: RUF001
    parts.append(arrow((x, 76), (330, 76), (330, 607), (x - 15, 607)))
    parts.append(text(324, 350, "y", 12, style=f'fill="{GREY}" transform="rotate(-90 324 350)"'))
    bracket = f'<path d="M 800 150 h 14 v 260 h -14" fill="none" stroke="{GREY}" stroke-width="1.5"/>'
    parts.append(bracket)
    for i, line in enumerate(("linear in z: computed by shift pooling,", "without the convolutions, exactly")):
        at = 848 - 19 * i  # turned by 90 degrees, the next line lies to the left
        parts.append(text(at, 280, line, 13, style=f'transform="rotate(90 {at} 280)"'))
    return parts


def draw() -> str:
    """Returns the figure as SVG text."""
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{INK}"/></marker>'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}">',
        "<title>Hierarchical global attention in a residual block</title>",
        f"<defs>{head}</defs>",
        '<rect width="100%" height="100%" fill="white"/>',
        *residual_block(),
        *mechanism(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("hga_block.svg").write_text(draw(), encoding="utf-8")
