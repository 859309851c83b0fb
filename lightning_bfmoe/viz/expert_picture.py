"""The map of experts as SVG, whose labels show on hover without JavaScript, and as a figure."""

import html
from typing import TYPE_CHECKING

import numpy as np

from lightning_bfmoe.viz.expert_embedding import Embedding
from lightning_bfmoe.viz.png import make_figure
from lightning_bfmoe.viz.routing_picture import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, EDGE = 640, 440, 46
_STYLE = """<style>
.bfm-map svg { max-width: 100%; height: auto; font: 12px sans-serif; overflow: visible; }
.bfm-map text { fill: currentColor; }
.bfm-map .tip { display: none; pointer-events: none; }
.bfm-map .tip rect { fill: #24292f; stroke: #8a9099; }
.bfm-map .tip text { fill: #ffffff; }
.bfm-map g.expert:hover circle, .bfm-map g.expert:focus circle { stroke: currentColor;
  stroke-width: 2.5; }
.bfm-map g.expert:focus { outline: none; }
</style>"""


def expert_svg(embedding: Embedding, layer: str) -> str:
    """The map; hovering a point, or Tab, shows the expert's load and top tokens.

    Args:
        embedding: See `embed_experts`.
        layer: Path of the layer.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    load, points = embedding.relative_load, embedding.points
    low, high = points.min(axis=0), points.max(axis=0)
    unit = min((WIDTH - 200 - 2 * EDGE), (HEIGHT - 2 * EDGE)) / max(1e-9, (high - low).max())
    place = (points - (low + high) / 2) * [unit, -unit] + [(WIDTH - 160) / 2, HEIGHT / 2]
    most = max(1.0, float(load.max()))
    # labels come after all points, so that none is hidden: what is written last lies on top
    groups, tips, rules = [], [], []
    for expert, (x, y) in enumerate(place):
        color = to_hex(colormaps["cividis"](load[expert] / most))
        radius = 5 + 7 * np.sqrt(load[expert] / most)
        lines = [f"expert {expert}: {load[expert]:.2f} of the mean load"]
        lines += [f"{visible(piece)}  \u00d7{count}" for piece, count in embedding.top[expert]]
        if len(lines) == 1:
            lines.append("took no token")
        told = html.escape("; ".join(lines), quote=True)
        tips.append(_tip(lines, x, y, expert))
        rules.append(f".e{expert}:hover ~ .t{expert}, .e{expert}:focus ~ .t{expert}")
        groups.append(
            f'<g class="expert e{expert}" tabindex="0" role="img" aria-label="{told}">'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}" '
            f'stroke="currentColor" stroke-opacity="0.5"/>'
            f'<text x="{x:.1f}" y="{y - radius - 3:.1f}" text-anchor="middle" '
            f'font-size="10">{expert}</text></g>'
        )
    ruler = _ruler(unit)
    bar = "".join(
        f'<rect x="{WIDTH - 60}" y="{HEIGHT - 60 - 3 * i}" width="12" height="3.5" '
        f'fill="{to_hex(colormaps["cividis"](i / 60))}"/>'
        for i in range(61)
    )
    return (
        f"{_STYLE}<style>{', '.join(rules)} {{ display: block !important; }}</style>"
        f'<div class="bfm-html bfm-map"><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" role="group" aria-label="Map of the experts of {html.escape(layer)}">'
        f'{bar}<text x="{WIDTH - 42}" y="{HEIGHT - 56}">0</text>'
        f'<text x="{WIDTH - 42}" y="{HEIGHT - 232}">{most:.2g}</text>'
        f'<text x="{WIDTH - 66}" y="{HEIGHT - 252}">load / mean</text>{ruler}'
        f"{''.join(groups)}{''.join(tips)}"
        f"</svg><p>Distances in the plane hold {embedding.explained:.0%} of the experts' scatter. "
        "Hover a point, or press Tab, for its top tokens.</p></div>"
    )


def _tip(lines: list[str], x: float, y: float, expert: int) -> str:
    width, height = 14 + 6.9 * max(map(len, lines)), 8 + 15 * len(lines)
    left = min(x + 14, WIDTH - width - 4)
    top = min(max(4, y - height / 2), HEIGHT - height - 4)
    words = "".join(
        f'<text x="{left + 7:.1f}" y="{top + 16 + 15 * i:.1f}" xml:space="preserve">'
        f"{html.escape(line)}</text>"
        for i, line in enumerate(lines)
    )
    box = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height}" rx="4"/>'
    return f'<g class="tip t{expert}">{box}{words}</g>'


def _ruler(unit: float) -> str:
    power = 10.0 ** np.floor(np.log10(80 / unit))
    length = max(m * power for m in (1, 2, 5) if m * power * unit <= 80)
    return (
        f'<path d="M12 {HEIGHT - 14} h{length * unit:.1f}" stroke="currentColor"/>'
        f'<text x="{18 + length * unit:.1f}" y="{HEIGHT - 10}">distance {length:.2g}</text>'
    )


def expert_figure(embedding: Embedding, layer: str, tokens: int = 3) -> "Figure":
    """The map with each expert's first tokens beside its point.

    Args:
        embedding: See `embed_experts`.
        layer: Path of the layer.
        tokens: Tokens written beside a point (count); none in layers of more than 32 experts.
    """
    figure = make_figure(7.2, 5.2)
    axes = figure.subplots()
    load = embedding.relative_load
    most = max(1.0, float(load.max()))
    scatter = axes.scatter(
        embedding.points[:, 0], embedding.points[:, 1], c=load, s=30 + 130 * load / most,
        cmap="cividis", vmin=0, vmax=most, edgecolors="#555555", linewidths=0.7,
    )  # fmt: skip
    figure.colorbar(scatter, ax=axes, label="load / mean")
    few = len(load) <= 32
    for expert, point in enumerate(embedding.points):
        pieces = " ".join(visible(piece) for piece, _ in embedding.top[expert][:tokens])
        # a $ would begin mathematics, and no font has every character
        safe = "".join(c if c.isprintable() and c != "$" else "?" for c in pieces)
        axes.annotate(
            f"{expert}  {safe}" if few else str(expert), point, (5, 5),
            textcoords="offset points", fontsize=7,
        )  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.set_title(
        f"{layer}: experts by the distance of their rotations\n"
        f"(the plane holds {embedding.explained:.0%} of the scatter)",
        fontsize=9,
    )
    axes.tick_params(labelsize=8)
    return figure
