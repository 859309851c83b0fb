"""OrbitExplorer in a real browser: in JupyterLab with a kernel, and as a file without anything."""

import json

import numpy as np
import pytest

from lightning_bfmoe.viz import ExplorerData, Recording, Snapshot, export_explorer
from lightning_bfmoe.viz.orbits import distances, orbit, signs
from tests.browser.lab import write_notebook

pytestmark = pytest.mark.slow

LAYERS = {
    ("blocks.0.mlp", "up/in"): 64,
    ("blocks.0.mlp", "down/in"): 96,
    ("blocks.1.mlp", "up/in"): 8,
}
STAGES = {8: 3, 64: 6, 96: 7}
EXPERTS = 8


@pytest.fixture(scope="module")
def recording() -> Recording:
    """Experts that start together and part, two of them less than the others."""
    rng = np.random.default_rng(0)
    ends = {key: rng.normal(0, 0.5, (EXPERTS, STAGES[d], d // 2)) for key, d in LAYERS.items()}
    for end in ends.values():
        end[5] = 0.8 * end[2] + 0.2 * end[5]
    snapshots = []
    for i, step in enumerate((0, 100, 200, 300, 400)):
        angles = {key: (0.02 + 0.245 * i) * end for key, end in ends.items()}
        snapshots.append(
            Snapshot(
                step,
                {key: value.astype(np.float16) for key, value in angles.items()},
                {"blocks.0.mlp": rng.integers(200, 900, EXPERTS)},
                float("nan") if i == 0 else 3.0 * 0.8**i,
            )
        )
    return Recording(dict(LAYERS), snapshots)


def settle(page) -> dict:
    """Wait until the picture is that of the controls; the numbers it shows."""
    page.wait_for_function(
        """() => { const root = document.querySelector(".bfm-explorer");
        return root && !root.hasAttribute("aria-busy")
          && root.querySelector(".bfm-readout").dataset.distance; }"""
    )
    text = page.locator(".bfm-readout").evaluate("node => JSON.stringify(node.dataset)")
    words = ("layer", "rotation")
    return {k: v if k in words else float(v) for k, v in json.loads(text).items()}


def expect_numpy(recording: Recording, shown: dict) -> None:
    """Every number on the page is the one that numpy computes."""
    key = shown["layer"], shown["rotation"]
    angles, d = recording.angles(*key), recording.widths[key]
    how = {"stages": int(shown["stages"]), "scale": shown["scale"]}
    a, b, at = int(shown["a"]), int(shown["b"]), int(shown["checkpoint"])
    expected = distances(angles[at], d, **how)
    assert shown["distance"] == pytest.approx(expected.values[a, b], abs=1e-5)
    assert shown["mean"] == pytest.approx(expected.mean, abs=1e-5)
    probe = signs(range(1), d)[0]
    point = orbit(angles[at], angles[-1], probe, a, b, trail=False, experts=[a], **how)[0, 0]
    assert [shown["u"], shown["v"]] == pytest.approx(point, abs=1e-6)


def put(page, name: str, value: object) -> dict:
    """Move a slider."""
    page.locator(f'.bfm-explorer input[aria-label="{name}"]').fill(str(value))
    return settle(page)


def cell_center(page, row: int, column: int) -> dict:
    """Where a cell of the heatmap lies, as drawn by drawHeatmap."""
    box = page.locator(".bfm-heatmap").bounding_box()
    left, top, right = 30, 30, 92
    cell = min(box["width"] - left - right, box["height"] - top - 8) / EXPERTS
    return {"x": left + (column + 0.5) * cell, "y": top + (row + 0.5) * cell}


def exercise(page, recording: Recording) -> None:
    """Every control once, each time compared with numpy."""
    expect_numpy(recording, settle(page))
    put(page, "checkpoint", 3)
    put(page, "stages", 4)
    shown = put(page, "scale", 0.5)
    assert (shown["checkpoint"], shown["stages"], shown["scale"]) == (3, 4, 0.5)
    expect_numpy(recording, shown)
    page.locator(".bfm-heatmap").click(position=cell_center(page, 2, 5))
    page.wait_for_function("document.querySelector('.bfm-readout').dataset.b === '5'")
    shown = settle(page)
    assert (shown["a"], shown["b"]) == (2, 5)
    expect_numpy(recording, shown)
    page.locator(".bfm-heatmap").press("ArrowRight")
    page.wait_for_function("document.querySelector('.bfm-readout').dataset.b === '6'")
    page.locator(".bfm-heatmap").press("ArrowUp")
    page.wait_for_function("document.querySelector('.bfm-readout').dataset.a === '1'")
    expect_numpy(recording, settle(page))
    page.locator('select[aria-label="rotation"]').select_option("down/in")
    page.wait_for_function("document.querySelector('.bfm-readout').dataset.rotation === 'down/in'")
    expect_numpy(recording, settle(page))
    put(page, "checkpoint", len(recording) - 1)
    play = page.get_by_role("button", name="Play")
    play.click()  # from the end it starts anew
    page.wait_for_function("document.querySelector('.bfm-readout').dataset.checkpoint === '1'")
    page.get_by_role("button", name="Pause").click()
    at = settle(page)["checkpoint"]
    expect_numpy(recording, settle(page))
    play.wait_for()
    assert 1 <= at < len(recording)


def test_the_exported_page_needs_no_kernel_and_no_network(tmp_path, watched, recording):
    path = export_explorer(ExplorerData.of(recording), tmp_path / "orbits.html")
    watched.page.goto(path.as_uri())
    exercise(watched.page, recording)
    watched.assert_clean()


GREEDY = """
window.taken = [];
document.addEventListener("keydown", (event) => {
  window.taken.push(event.key);
  event.preventDefault();
  event.stopPropagation();
}, true);
"""


def test_keys_belong_to_what_has_the_focus(tmp_path, watched, recording):
    page = watched.page
    page.goto(export_explorer(ExplorerData.of(recording), tmp_path / "keys.html").as_uri())
    before = settle(page)
    page.evaluate(GREEDY)  # as Notebook 7 does with its shortcuts
    page.locator(".bfm-heatmap").press("ArrowRight")
    page.locator('.bfm-explorer input[aria-label="checkpoint"]').press("ArrowLeft")
    page.locator('.bfm-explorer select[aria-label="rotation"]').press("d")  # "d d" deletes a cell
    shown = settle(page)
    assert (shown["b"], shown["checkpoint"]) == (before["b"] + 1, before["checkpoint"] - 1)
    assert shown["rotation"] == "down/in"  # typed ahead
    assert page.evaluate("window.taken") == []
    page.locator(".bfm-heatmap").press("Control+s")  # but what saves goes on saving
    assert page.evaluate("window.taken.at(-1)") == "s"


def test_a_wide_layer_does_not_freeze_the_page(tmp_path, watched):
    rng = np.random.default_rng(0)
    angles = rng.normal(0, 0.3, (12, 12, 2048)).astype(np.float16)
    wide = Recording({("m", "up/in"): 4096}, [Snapshot(0, {("m", "up/in"): angles})])
    page = watched.page
    page.goto(export_explorer(ExplorerData.of(wide), tmp_path / "wide.html").as_uri())
    settle(page)
    page.evaluate(
        "window.turns = 0; const beat = () => {"
        "if (document.querySelector('[aria-busy]')) window.turns++; setTimeout(beat, 0); }; beat();"
    )
    shown = put(page, "scale", 0.7)
    expected = distances(angles, 4096, scale=0.7)
    assert shown["mean"] == pytest.approx(expected.mean, abs=1e-5)
    assert page.evaluate("window.turns") > 5  # the page got its turns while it computed
    watched.assert_clean()


CELL = """
from lightning_bfmoe import OrbitExplorer
from lightning_bfmoe.viz import explorer as module
module.INLINE_BYTES = 0  # as if it were large: matrices come from the kernel when they are chosen
explorer = OrbitExplorer("orbits.safetensors")
explorer
"""
CHECK = """
print("kernel:", explorer.checkpoint, explorer.a, explorer.b, explorer.rotation)
explorer.checkpoint, explorer.layer = 2, "blocks.1.mlp"
"""


def run_cell(page, number: int) -> None:
    """Run one cell of the notebook by its keyboard shortcut."""
    page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")


def test_it_is_live_in_jupyterlab(watched, lab, recording):
    address, root = lab
    recording.write(root / "orbits.safetensors")
    write_notebook(root / "live.ipynb", [CELL, CHECK])
    page = watched.page
    page.goto(f"{address}/lab/tree/live.ipynb?reset")
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    run_cell(page, 0)
    page.wait_for_selector(".bfm-heatmap")
    put(page, "checkpoint", 1)
    page.locator('select[aria-label="rotation"]').select_option("down/in")
    page.wait_for_function("document.querySelector('.bfm-readout').dataset.rotation === 'down/in'")
    put(page, "a", 1)
    expect_numpy(recording, put(page, "b", 6))
    run_cell(page, 1)
    page.wait_for_selector("text=kernel: 1 1 6 down/in")  # JavaScript -> Python
    page.wait_for_function(
        "document.querySelector('.bfm-readout').dataset.layer === 'blocks.1.mlp'"
    )  # Python -> JavaScript
    shown = settle(page)
    assert (shown["checkpoint"], shown["rotation"]) == (2, "up/in")
    expect_numpy(recording, shown)
    watched.assert_clean()
