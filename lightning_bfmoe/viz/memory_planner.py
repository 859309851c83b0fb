"""Sliders for the sizes of a layer, and its bytes beside the honest controls.

The numbers come from a function that is passed in, since rooms of one floor do not import one
another: `lightning_bfmoe.MemoryPlanner` is this widget with `deploy.plan_memory`.
"""

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lightning_bfmoe.viz.assets import style
from lightning_bfmoe.viz.png import PALETTE, make_figure, widget_library, with_picture
from lightning_bfmoe.viz.routes import explain

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure
else:
    ipywidgets = widget_library("ipywidgets")


WIDTHS = [
    64,
    128,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    5120,
    8192,
    11008,
    16384,
    28672,
]
EXPERTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
_STYLE = """<style>
.bfm-html table.bfm-table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.bfm-html table.bfm-table th, .bfm-html table.bfm-table td { text-align: right; padding: 2px 10px;
  border-bottom: 1px solid var(--bfm-edge); }
.bfm-html table.bfm-table th:first-child { text-align: left; font-weight: 400; }
.bfm-html table.bfm-table tr.ours th, .bfm-html table.bfm-table tr.ours td { font-weight: 600; }
</style>"""


class Plan(Protocol):
    """What is needed of a memory plan."""

    def bytes(self, form: str = ...) -> int:
        """Bytes of a form."""
        ...


class MemoryPlannerBase(ipywidgets.VBox):
    """See `lightning_bfmoe.MemoryPlanner`.

    Args:
        plan: Settings -> plan.
        fit: Device and settings -> experts that fit, by form.
        forms: Form -> label; the last one is ours.
        devices: Name -> bytes of memory.
        human: Bytes -> text.
        settings: What the sliders begin with: d_model, d_ff, num_experts, top_k, angle_bits,
            layers, gated, device; anything else is passed on to `plan` as it is.
    """

    def __init__(
        self,
        plan: Callable[..., Plan],
        fit: Callable[..., Mapping[str, int]],
        forms: Mapping[str, str],
        devices: Mapping[str, int],
        human: Callable[[float], str],
        settings: dict[str, Any],
    ) -> None:
        self._plan, self._fit, self._human = plan, fit, human
        self._forms, self._devices = dict(forms), dict(devices)
        chosen = dict(settings)
        self.sliders: dict[str, Any] = {
            "d_model": _steps("d_model", WIDTHS, chosen.pop("d_model")),
            "d_ff": _steps("d_ff", WIDTHS, chosen.pop("d_ff")),
            "num_experts": _steps("experts N", EXPERTS, chosen.pop("num_experts")),
            "top_k": ipywidgets.IntSlider(chosen.pop("top_k"), 1, 16, description="top-k"),
            "angle_bits": _steps("angle bits", [4, 8, 16, 32], chosen.pop("angle_bits")),
            "layers": ipywidgets.IntSlider(chosen.pop("layers"), 1, 128, description="layers"),
            "gated": ipywidgets.Checkbox(chosen.pop("gated"), description="gated (SwiGLU)"),
            "device": ipywidgets.Dropdown(
                options=list(devices), value=chosen.pop("device"), description="device"
            ),
        }
        self._others = chosen
        self._picture = ipywidgets.HTML()
        controls = ipywidgets.GridBox(
            list(self.sliders.values()),
            layout=ipywidgets.Layout(grid_template_columns="repeat(auto-fit, minmax(310px, 1fr))"),
        )
        super().__init__([controls, self._picture])
        for slider in self.sliders.values():
            slider.observe(self._draw, names="value")
        self._compute()  # an error in the given settings is the caller's
        self._draw()

    @property
    def settings(self) -> dict[str, Any]:
        """What the sliders say, `device` included."""
        return {name: slider.value for name, slider in self.sliders.items()} | self._others

    @property
    def plan(self) -> Plan:
        """The plan of the layer that is shown."""
        return self._compute()[0]

    def _compute(self) -> tuple[Plan, Mapping[str, int]]:
        sizes = self.settings
        device = sizes.pop("device")
        plan = self._plan(**sizes)
        del sizes["num_experts"], sizes["top_k"]
        return plan, self._fit(device, **sizes)

    def _draw(self, change: Any = None) -> None:
        try:
            body = self._table()
        except ValueError as error:  # top_k above N, for example: said where the eyes are
            body = f"<p><b>{html.escape(explain(error))}</b></p>"
        head = f"<style>{style()}</style>{_STYLE}"
        self._picture.value = f'{head}<div class="bfm-html">{body}</div>'

    def _table(self) -> str:
        plan, fit = self._compute()
        device = self.settings["device"]
        ram, ours = self._devices[device], list(self._forms)[-1]
        rows = []
        for form, label in self._forms.items():
            size = plan.bytes(form)
            times = "" if form == ours else f"{size / plan.bytes(ours):.1f}\u00d7"
            room = f"{fit[form]:,}" if form in fit else "\u2013"
            mark = ' class="ours"' if form == ours else ""
            rows.append(
                f'<tr{mark}><th scope="row">{label}</th><td>{self._human(size)}</td>'
                f"<td>{times}</td><td>{_percent(size / ram)}</td><td>{room}</td></tr>"
            )
        return (
            '<table class="bfm-table"><tr><th>feed-forward layers</th><th>bytes</th>'
            f"<th>against ours</th><th>of {device} ({self._human(ram)})</th>"
            f"<th>experts that fit</th></tr>{''.join(rows)}</table>"
            "<p>The fair opponent of equal kind is the ternary MoE; a dense layer has one expert's "
            "weights. top-k costs time, not bytes. Scales, router and biases are counted; "
            "attention and embeddings are not.</p>"
        )

    def figure(self) -> "Figure":
        """Bytes of every form and of the device, on a logarithmic axis."""
        plan, settings = self.plan, self.settings
        sizes = [plan.bytes(form) for form in self._forms]
        figure = make_figure(7.5, 2.9)
        axes = figure.subplots()
        colors = [PALETTE[6]] * (len(sizes) - 1) + [PALETTE[0]]
        axes.barh(range(len(sizes)), sizes, color=colors)
        for row, size in enumerate(sizes):
            times = "" if row == len(sizes) - 1 else f"   {size / sizes[-1]:.1f}x ours"
            axes.annotate(
                self._human(size) + times, (size, row), (4, 0), textcoords="offset points",
                va="center", fontsize=8, zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        ram = self._devices[settings["device"]]
        axes.axvline(ram, color=PALETTE[1], ls="--")
        axes.annotate(
            f" {settings['device']}: {self._human(ram)}", (ram, len(sizes) - 0.45), fontsize=8,
            color=PALETTE[1], annotation_clip=False,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 3, max(*sizes, ram) * 30)
        axes.set_yticks(range(len(sizes)), list(self._forms.values()), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("bytes", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        names = ("d_model", "d_ff", "num_experts", "top_k", "angle_bits", "layers")
        title = ", ".join(f"{name} {settings[name]}" for name in names)
        axes.set_title(title + (", gated" if settings["gated"] else ""), fontsize=9, pad=14)
        return figure

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        words = f"MemoryPlanner: {self.settings}"
        return with_picture(super()._repr_mimebundle_(**kwargs), self.figure(), words)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 1 else f"{100 * share:.2g}%"


def _steps(label: str, options: list[int], value: int) -> Any:
    return ipywidgets.SelectionSlider(
        options=sorted({*options, value}), value=value, description=label
    )
