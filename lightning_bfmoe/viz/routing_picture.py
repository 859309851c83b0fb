"""A routed sentence as HTML for the live view, and as a matplotlib figure."""

import html
from typing import TYPE_CHECKING

import numpy as np

from lightning_bfmoe.viz.png import PALETTE, make_figure
from lightning_bfmoe.viz.routes import Routes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 48
_STYLE = """<style>
.bfm-html { line-height: 1.2; }
.bfm-tokens { display: flex; flex-wrap: wrap; gap: 6px 2px; font-family: var(--jp-code-font-family,
  monospace); }
.bfm-token { display: inline-flex; flex-direction: column; border-bottom: 4px solid;
  padding: 1px 4px; white-space: pre; border-radius: 2px; }
.bfm-token small { font-size: 10px; opacity: 0.85; }
.bfm-token:focus-visible { outline: 2px solid #0072b2; }
</style>"""


def color_of(expert: int) -> str:
    """A colour that repeats after eight: the number beside it says which expert it is."""
    return PALETTE[expert % len(PALETTE)]


def visible(piece: str) -> str:
    """A token's text with its white space made visible."""
    return piece.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")


def routing_html(routes: Routes, layer: str) -> str:
    """Every token with its experts beneath: hover, or Tab, says their weights."""
    cells = []
    columns = zip(routes.pieces, routes.experts[layer], routes.weights[layer], strict=True)
    for piece, experts, weights in columns:
        told = ", ".join(f"expert {e}: {w:.0%}" for e, w in zip(experts, weights, strict=True))
        title = html.escape(f"{visible(piece)} \u2192 {told}", quote=True)
        cells.append(
            f'<span class="bfm-token" tabindex="0" title="{title}" aria-label="{title}" '
            f'style="border-color:{color_of(int(experts[0]))}">{html.escape(visible(piece))}'
            f"<small>{' '.join(map(str, experts))}</small></span>"
        )
    load = routes.load(layer)
    used = int((load > 0).sum())
    busiest = ", ".join(f"{e} ({load[e]})" for e in np.argsort(-load, kind="stable")[:6] if load[e])
    return (
        f'{_STYLE}<div class="bfm-html"><div class="bfm-tokens">{"".join(cells)}</div>'
        f"<p>{used} of {len(load)} experts took a token; busiest: {busiest}. Numbers are experts, "
        "the heaviest first; the line has the colour of that one.</p></div>"
    )


def routing_figure(routes: Routes, layer: str) -> "Figure":
    """Weight of each expert for each token, the first `MAX_TOKENS` of them.

    Args:
        routes: See `trace_routes`.
        layer: Path of the layer.
    """
    count, total = min(MAX_TOKENS, len(routes.pieces)), routes.num_experts[layer]
    grid = np.full((total, count), np.nan)
    for token in range(count):
        for expert, weight in zip(
            routes.experts[layer][token], routes.weights[layer][token], strict=True
        ):
            grid[expert, token] = np.nansum([grid[expert, token], weight])
    figure = make_figure(max(4.5, 0.24 * count + 1.8), min(9.0, max(2.4, 0.16 * total + 1.3)))
    axes = figure.subplots()
    image = axes.imshow(
        grid, cmap="cividis_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(range(count), [visible(p) for p in routes.pieces[:count]], rotation=90)
    axes.tick_params(axis="x", labelsize=8, labelfontfamily="monospace")
    step = max(1, total // 16)
    axes.set_yticks(range(0, total, step))
    axes.set_ylabel("expert")
    axes.set_xlim(-0.5, count - 0.5)
    axes.grid(axis="x", alpha=0.2)
    more = "" if count == len(routes.pieces) else f" (first {count} of {len(routes.pieces)} tokens)"
    axes.set_title(f"{layer}: who took which token{more}", fontsize=9)
    figure.colorbar(image, ax=axes, label="weight")
    return figure
