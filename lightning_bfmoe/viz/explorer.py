"""`OrbitExplorer`: the experts of a model, live in a notebook."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_bfmoe.viz.assets import script, style
from lightning_bfmoe.viz.explorer_data import CHOICES, ExplorerData, Source, check_choice
from lightning_bfmoe.viz.explorer_picture import (
    Selection,
    default_selection,
    explorer_figure,
    selected_distances,
)
from lightning_bfmoe.viz.export import MAX_BYTES, export_explorer
from lightning_bfmoe.viz.png import widget_library, with_picture
from lightning_bfmoe.viz.recording import Recording
from lightning_bfmoe.viz.snapshot import Patterns

if TYPE_CHECKING:
    import anywidget
    import traitlets
    from matplotlib.figure import Figure
else:
    anywidget = widget_library("anywidget")
    traitlets = widget_library("traitlets")


INLINE_BYTES = 8 << 20
"""Angles up to this size travel with the widget; larger recordings come matrix by matrix."""


class OrbitExplorer(anywidget.AnyWidget):
    """Explores the experts' rotations: distances, orbits and butterflies, over a training.

    The mathematics runs in the browser, so that sliders answer at once and an exported page needs
    no kernel. Shown as the last expression of a cell it is live, and leaves a PNG for places that
    run no JavaScript (GitHub, nbviewer). Distances are defined in `viz.orbits`.

    Every choice is an attribute that can be read, set and observed from Python.

    Example:
        >>> from lightning_bfmoe.layers import ButterflyMoE
        >>> explorer = OrbitExplorer(ButterflyMoE(8, 16, num_experts=4), rotation="down/in", b=3)
        >>> explorer.distances().shape
        (4, 4)

    Args:
        source: A recording, the path of one, or a model: any module with ButterflyMoE layers.
        layers: Patterns (`fnmatch`) of layer paths; all when None.
        probes: Vectors (K, d) to rotate, as hidden states of your model; where no rotation has
            their width, and when None, vectors of random signs are rotated.
        **selection: Any attribute below.

    Attributes:
        checkpoint: Record that is shown (index).
        layer: Path of the layer.
        rotation: ``up/in``, ``up/out``, and so for gate and down.
        a: Expert A.
        b: Expert B.
        stages: Stages of the butterfly that are applied (count).
        scale: Factor of every angle, 0 to 2.
        probe: Index of the vector that is rotated.
        measure: ``rotation`` or ``angle``, see `viz.orbits.MEASURES`.
        show: Whose angles the butterfly shows: ``a``, ``b`` or ``gap`` (A - B).

    Raises:
        ConfigError: A choice that the source does not offer.
    """

    _esm = script()
    _css = style()
    meta = traitlets.Dict().tag(sync=True)
    angles = traitlets.Bytes().tag(sync=True)
    probes = traitlets.Bytes().tag(sync=True)
    checkpoint = traitlets.Int().tag(sync=True)
    layer = traitlets.Unicode().tag(sync=True)
    rotation = traitlets.Unicode().tag(sync=True)
    a = traitlets.Int().tag(sync=True)
    b = traitlets.Int().tag(sync=True)
    stages = traitlets.Int().tag(sync=True)
    scale = traitlets.Float().tag(sync=True)
    probe = traitlets.Int().tag(sync=True)
    measure = traitlets.Unicode().tag(sync=True)
    show = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, source: Source, layers: Patterns = None, *, probes: Any = None, **selection: Any
    ) -> None:
        self.data = ExplorerData.of(source, layers, probes)
        values = _select(self.data, selection)
        sizes, chosen = (
            self.data.sizes(),
            self.data.keys.index((values["layer"], values["rotation"])),
        )
        inline = list(range(len(sizes))) if sum(sizes) <= INLINE_BYTES else [chosen]
        super().__init__(
            meta=self.data.meta(inline),
            angles=b"".join(map(self.data.block, inline)),
            probes=self.data.probe_bytes(),
            **values,
        )
        self.on_msg(self._answer)

    def _answer(self, widget: Any, content: Any, buffers: Any) -> None:
        """Send the angles of a matrix that the page asks for."""
        index = content.get("want") if isinstance(content, dict) else None
        if isinstance(index, int) and 0 <= index < len(self.data.keys):
            self.send({"block": index}, buffers=[self.data.block(index)])

    @traitlets.validate("checkpoint", "a", "b", "stages", "scale", "probe")
    def _check_number(self, proposal: Any) -> Any:
        low, high = _bounds(self.data, self.layer, self.rotation)[proposal["trait"].name]
        if not low <= proposal["value"] <= high:
            check_choice(proposal["trait"].name, proposal["value"], [f"{low} to {high}"])
        return proposal["value"]

    @traitlets.validate("measure", "show")
    def _check_word(self, proposal: Any) -> Any:
        check_choice(proposal["trait"].name, proposal["value"], CHOICES[proposal["trait"].name])
        return proposal["value"]

    @traitlets.validate("layer")
    def _check_layer(self, proposal: Any) -> Any:
        check_choice("layer", proposal["value"], self.recording.layers)
        return proposal["value"]

    @traitlets.validate("rotation")
    def _check_rotation(self, proposal: Any) -> Any:
        check_choice("rotation", proposal["value"], self.recording.rotations(self.layer))
        return proposal["value"]

    @traitlets.observe("layer", "rotation")
    def _keep_in_bounds(self, change: Any) -> None:
        """Another matrix may have other sides, fewer experts and fewer stages."""
        there = self.recording.rotations(self.layer)
        if self.rotation not in there:
            self.rotation = there[0]
        for name, (low, high) in _bounds(self.data, self.layer, self.rotation).items():
            setattr(self, name, min(max(getattr(self, name), low), high))

    @property
    def recording(self) -> Recording:
        """What is explored."""
        return self.data.recording

    @property
    def selection(self) -> Selection:
        """All choices at once."""
        return Selection(**{name: getattr(self, name) for name in Selection.names()})

    def distances(self) -> np.ndarray:
        """The heatmap's numbers, (experts, experts), computed in numpy."""
        return selected_distances(self.data, self.selection).values

    def figure(self) -> "Figure":
        """What the widget shows now, as a matplotlib figure."""
        return explorer_figure(self.data, self.selection)

    def export_html(
        self,
        path: str | Path,
        *,
        title: str = "Orbits of the experts",
        max_bytes: int = MAX_BYTES,
    ) -> Path:
        """Write the explorer as one HTML file; see `viz.export_explorer`."""
        return export_explorer(self.data, path, self.selection, title=title, max_bytes=max_bytes)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        words = f"OrbitExplorer: {len(self.recording)} records of {self.recording.layers}"
        return with_picture(super()._repr_mimebundle_(**kwargs), self.figure(), words)


def _bounds(data: ExplorerData, layer: str, rotation: str) -> dict[str, tuple[float, float]]:
    experts, stages, _ = data.recording.snapshots[0].angles[layer, rotation].shape
    return {
        "checkpoint": (0, len(data.recording) - 1), "a": (0, experts - 1), "b": (0, experts - 1),
        "stages": (1, stages), "scale": (0.0, 2.0),
        "probe": (0, data.num_probes(data.recording.widths[layer, rotation]) - 1),
    }  # fmt: skip


def _select(data: ExplorerData, chosen: dict[str, Any]) -> dict[str, Any]:
    """All choices from those that were given, in the order in which they can be checked."""
    default = default_selection(data)
    for name in chosen:
        check_choice("an attribute", name, Selection.names())
    values = {name: chosen.get(name, getattr(default, name)) for name in Selection.names()}
    check_choice("layer", values["layer"], data.recording.layers)
    if "rotation" not in chosen:
        values["rotation"] = data.recording.rotations(values["layer"])[0]
    check_choice("rotation", values["rotation"], data.recording.rotations(values["layer"]))
    bounds = _bounds(data, values["layer"], values["rotation"])
    if "stages" not in chosen:
        values["stages"] = int(bounds["stages"][1])
    if "b" not in chosen:
        values["b"] = int(min(1, bounds["b"][1]))
    return values
