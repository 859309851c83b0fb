"""OrbitExplorer from Python: what it sends, what it refuses, its picture and its page."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bfmoe import viz
from lightning_bfmoe.errors import BFMoEError, ConfigError
from lightning_bfmoe.layers import ButterflyMoE
from lightning_bfmoe.viz import ExplorerData, OrbitExplorer, Recording, Snapshot, explorer_figure
from lightning_bfmoe.viz import explorer as explorer_module
from lightning_bfmoe.viz.assets import script
from lightning_bfmoe.viz.export import export_explorer
from lightning_bfmoe.viz.orbits import distances
from lightning_bfmoe.viz.png import widget_library


def make_recording(records: int = 3, experts: int = 5) -> Recording:
    rng = np.random.default_rng(0)
    keys = {("net.0", "up/in"): 8, ("net.0", "up/out"): 12, ("net.1", "down/in"): 12}
    stages = {8: 3, 12: 4}

    def angles(d: int) -> np.ndarray:
        return rng.normal(0, 0.5, (experts, stages[d], d // 2)).astype(np.float16)

    snapshots = [
        Snapshot(
            10 * i,
            {key: angles(d) for key, d in keys.items()},
            {"net.0": rng.integers(1, 9, experts)},
            float("nan") if i == 0 else 3.0 - i,
        )
        for i in range(records)
    ]
    return Recording(keys, snapshots)


def test_it_starts_at_the_newest_record_with_everything_applied():
    explorer = OrbitExplorer(make_recording())
    selection = explorer.selection
    assert (selection.checkpoint, selection.layer, selection.rotation) == (2, "net.0", "up/in")
    assert (selection.a, selection.b, selection.stages, selection.scale) == (0, 1, 3, 1.0)
    found = distances(explorer.recording.angles("net.0", "up/in")[2], 8)
    np.testing.assert_array_equal(explorer.distances(), found.values)


def test_the_bytes_are_the_angles():
    explorer = OrbitExplorer(make_recording())
    assert json.loads(json.dumps(explorer.meta, allow_nan=False)) == explorer.meta
    assert explorer.meta["losses"] == [None, 2.0, 1.0]
    for entry, key in zip(explorer.meta["inline"], explorer.data.keys, strict=True):
        part = explorer.angles[entry["offset"] : entry["offset"] + entry["bytes"]]
        values = np.frombuffer(part, "<f2").reshape(explorer.recording.angles(*key).shape)
        np.testing.assert_array_equal(values, explorer.recording.angles(*key))
    assert [block["loads"] is None for block in explorer.meta["blocks"]] == [False, False, True]


def test_a_large_recording_comes_matrix_by_matrix(monkeypatch):
    monkeypatch.setattr(explorer_module, "INLINE_BYTES", 100)
    explorer = OrbitExplorer(make_recording(), layer="net.1")
    assert [entry["block"] for entry in explorer.meta["inline"]] == [2]
    assert len(explorer.angles) == explorer.data.sizes()[2]
    sent = []
    monkeypatch.setattr(explorer, "send", lambda content, buffers: sent.append((content, buffers)))
    for want in ({"want": 1}, {"want": 9}, {"want": "x"}, {}, "no"):
        explorer._answer(explorer, want, [])
    assert sent == [({"block": 1}, [explorer.data.block(1)])]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layer": "net.9"}, r"layer is one of \['net.0', 'net.1'\]: got 'net.9'"),
        ({"rotation": "down/in"}, r"rotation is one of \['up/in', 'up/out'\]"),
        ({"a": 5}, r"a is one of \['0 to 4'\]: got 5"),
        ({"checkpoint": -1}, r"checkpoint is one of \['0 to 2'\]"),
        ({"stages": 0}, r"stages is one of \['1 to 3'\]"),
        ({"scale": 3.0}, r"scale is one of \['0.0 to 2.0'\]"),
        ({"measure": "cosine"}, r"measure is one of \['rotation', 'angle'\]"),
        ({"layers": "x*"}, r"layers= fits a layer of the recording: got x\*"),
        ({"probes": np.ones((2, 5))}, r"width d of a rotation: got shape \(2, 5\)"),
        ({"probes": np.zeros((2, 8))}, "non-zero vectors"),
        ({"colour": 1}, "an attribute is one of"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(choice, message):
    with pytest.raises(ConfigError, match=message):
        OrbitExplorer(make_recording(), **choice)


def test_attributes_are_checked_when_they_are_set():
    explorer = OrbitExplorer(make_recording(), rotation="up/out", stages=4, b=4)
    with pytest.raises(ConfigError, match="b is one of"):
        explorer.b = 5
    assert explorer.b == 4
    explorer.rotation = "up/in"  # three stages only
    assert explorer.stages == 3
    explorer.layer = "net.1"
    assert explorer.rotation == "down/in"


def test_a_model_or_a_path_will_do(tmp_path):
    model = ButterflyMoE(8, 16, num_experts=4)
    assert OrbitExplorer(model).distances().shape == (4, 4)
    path = make_recording().write(tmp_path / "orbits.safetensors")
    assert OrbitExplorer(path, layers="net.1").recording.layers == ["net.1"]
    single = OrbitExplorer(ButterflyMoE(8, 16, num_experts=1, top_k=1))
    assert single.distances().tolist() == [[0.0]] and single.b == 0


def test_own_probes_are_used_at_their_width():
    probes = torch.randn(3, 12)
    explorer = OrbitExplorer(make_recording(), probes=probes, rotation="up/out", probe=2)
    sent = np.frombuffer(explorer.probes, "<f4").reshape(3, 12)
    np.testing.assert_array_equal(sent, probes.numpy())
    np.testing.assert_array_equal(explorer.data.probe(12, 2), probes[2].numpy())
    assert set(np.abs(explorer.data.probe(8, 2))) == {1.0}
    assert explorer.data.num_probes(12) == 3


def test_it_leaves_a_picture():
    bundle, _ = OrbitExplorer(make_recording())._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(bundle["image/png"]) < 200_000
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "3 records of ['net.0', 'net.1']" in bundle["text/plain"]


@pytest.mark.parametrize("choice", [{}, {"measure": "angle", "show": "gap", "stages": 2, "a": 3}])
def test_the_figure_shows_the_numbers(choice):
    explorer = OrbitExplorer(make_recording(), **choice)
    figure = explorer.figure()
    (image,) = figure.axes[0].get_images()
    np.testing.assert_array_equal(image.get_array(), explorer.distances())
    assert f"mean {distances_mean(explorer):.4f}" in figure.axes[0].get_title()


def distances_mean(explorer: OrbitExplorer) -> float:
    values = explorer.distances()
    return values[~np.eye(len(values), dtype=bool)].mean()


def test_a_wide_layer_has_a_figure():
    angles = {("m", "up/in"): np.full((3, 12, 2048), 0.3, dtype=np.float16)}
    figure = explorer_figure(
        ExplorerData.of(Recording({("m", "up/in"): 4096}, [Snapshot(0, angles)]))
    )
    (strips,) = figure.axes[2].get_images()
    assert strips.get_array().shape == (256, 12) and np.allclose(strips.get_array(), 0.3, atol=1e-3)


def test_the_page_is_one_file_without_addresses(tmp_path):
    explorer = OrbitExplorer(make_recording(), b=3)
    path = explorer.export_html(tmp_path / "orbits.html", title="A <b> & c")
    page = path.read_text(encoding="utf-8")
    assert re.findall(r"https?://|src=|@import|\bimport\b[^;]*from", page) == []
    assert "<title>A &lt;b&gt; &amp; c</title>" in page
    data = json.loads(re.search(r'id="bfm-data">(.*?)</script>', page).group(1))
    assert base64.b64decode(data["angles"]) == explorer.angles
    assert data["state"]["b"] == 3 and data["state"]["meta"] == explorer.meta
    assert page.count("</script>") == 2


def test_a_page_too_large_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="take at most 100 bytes: got .* Choose layers="):
        export_explorer(ExplorerData.of(make_recording()), tmp_path / "x.html", max_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_the_script_is_one_module():
    assert len(re.findall(r"^export ", script(), flags=re.MULTILINE)) == 1
    assert re.findall(r"^import ", script(), flags=re.MULTILINE) == []
    names = re.findall(r"^(?:async )?(?:function\*?|const|let) (\w+)", script(), flags=re.MULTILINE)
    assert len(names) == len(set(names)), "two of the joined files use one name"


def test_without_the_libraries_a_widget_says_what_to_install():
    absent = widget_library("no_such_widget_library")

    class Widget(absent.VBox):
        value = absent.Int().tag(sync=True)

        @absent.observe("value")
        def changed(self, change):
            return change

    with pytest.raises(BFMoEError, match=r"Widget needs .* pip install .lightning-bfmoe.notebooks"):
        Widget(1, value=2)


def test_no_public_name_is_also_a_module():
    # once imported, a module of that name would hide the lazy attribute
    modules = {path.stem for path in Path(viz.__file__).parent.glob("*.py")}
    assert set(viz.__all__) & modules == set()
