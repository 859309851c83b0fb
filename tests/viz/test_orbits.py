"""The explorer's numbers: numpy against the layer's own rotations, JavaScript against numpy."""

import base64
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from lightning_bfmoe.functional.butterfly import apply_butterfly, butterfly_matrix, num_stages
from lightning_bfmoe.viz import assets, orbits

# experts, width, stages (None: all), scale: powers of two and not, odd, exact and estimated
CASES = [
    (5, 8, None, 1.0),
    (4, 12, 3, 0.7),
    (3, 7, None, 1.3),
    (2, 2, None, 1.0),
    (8, 384, None, 1.0),
    (24, 1536, 6, 0.5),
]
IDS = [f"E{e}-d{d}-stages{s}-scale{t}" for e, d, s, t in CASES]


def draw_angles(experts: int, d: int, std: float = 0.5) -> np.ndarray:
    shape = (experts, num_stages(d), d // 2)
    return np.random.default_rng(d).normal(0, std, shape).astype(np.float16)


@pytest.mark.parametrize(("experts", "d", "stages", "scale"), CASES, ids=IDS)
def test_numpy_rotates_as_the_layer_does(experts, d, stages, scale):
    angles = draw_angles(experts, d)
    x = np.random.default_rng(0).normal(size=(experts, d))
    turned = scale * torch.from_numpy(angles[:, :stages].astype(np.float64))
    expected = apply_butterfly(torch.from_numpy(x), turned).numpy()
    np.testing.assert_allclose(orbits.rotate(x, angles, stages, scale), expected, atol=1e-12)


def test_the_distance_is_that_of_the_matrices():
    angles = draw_angles(4, 12)
    dense = butterfly_matrix(torch.from_numpy(angles.astype(np.float64)), 12).numpy()
    found = orbits.distances(angles, 12)
    for a in range(4):
        for b in range(4):
            gap = np.linalg.norm(dense[a] - dense[b]) / np.sqrt(24)
            assert found.values[a, b] == pytest.approx(gap, abs=1e-7)
            trace = np.sqrt(max(0, 1 - np.trace(dense[a].T @ dense[b]) / 12))
            assert found.values[a, b] == pytest.approx(trace, abs=1e-7)
    assert found.standard_error == 0 and found.probes == 12
    off = found.values[~np.eye(4, dtype=bool)]
    assert found.mean == pytest.approx(off.mean())


def test_ends_of_the_scale():
    same = np.zeros((2, 3, 4))
    assert orbits.distances(same, 8).values.max() == 0
    opposite = same.copy()
    opposite[1, 0] = np.pi  # one stage of half turns: x -> -x
    assert orbits.distances(opposite, 8).values[0, 1] == pytest.approx(np.sqrt(2))
    unrelated = np.random.default_rng(0).uniform(-np.pi, np.pi, (8, 9, 256))
    assert orbits.distances(unrelated, 512).mean == pytest.approx(1, abs=0.01)


def test_an_estimate_is_as_near_as_it_says():
    angles = draw_angles(24, 1536, std=0.2)
    assert not orbits.is_exact(24, 1536) and orbits.is_exact(10, 1024)
    guess = orbits.distances(angles, 1536)
    assert guess.standard_error == pytest.approx(np.sqrt(2 / (guess.probes * 1536)))
    dense = [butterfly_matrix(torch.from_numpy(a.astype(np.float32)), 1536) for a in angles[:3]]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        truth = (dense[a] - dense[b]).square().sum().item() / (2 * 1536)
        assert abs(guess.values[a, b] ** 2 - truth) < 3 * guess.standard_error


def test_angle_differences_are_wrapped():
    angles = np.zeros((2, 1, 4))
    angles[0], angles[1] = 3.1, -3.1
    found = orbits.distances(angles, 8, "angle")
    assert found.values[0, 1] == pytest.approx(2 * np.pi - 6.2)
    assert orbits.distances(angles, 8, "angle", scale=0.5).values[0, 1] == pytest.approx(3.1)


def test_the_plane_keeps_the_distances_of_probe_a_and_b():
    angles, probe = draw_angles(5, 16), np.random.default_rng(1).normal(size=16)
    points = orbits.orbit(angles, angles, probe, 1, 3, trail=False)[:, 0]
    x = probe / np.linalg.norm(probe)
    images = orbits.rotate(x, angles)
    assert np.linalg.norm(points[1]) == pytest.approx(np.linalg.norm(images[1] - x))
    assert np.linalg.norm(points[3]) == pytest.approx(np.linalg.norm(images[3] - x))
    gap = np.linalg.norm(images[1] - images[3])
    assert np.linalg.norm(points[1] - points[3]) == pytest.approx(gap)
    assert np.linalg.norm(points[0]) <= np.linalg.norm(images[0] - x) + 1e-12


@pytest.mark.parametrize("angles", [np.zeros((3, 3, 4)), np.ones((3, 3, 4))])
def test_experts_that_coincide_still_have_a_plane(angles):
    points = orbits.orbit(angles, angles, np.ones(8), 0, 0)
    assert np.isfinite(points).all() and points.shape == (3, orbits.TRAIL + 1, 2)


HARNESS = """
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const bytes = Buffer.from(input.angles, "base64");
const angles = decodeHalf(new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength));
const { E, d, S, stages, scale } = input, view = { E, d, S, angles, start: 0 };
const run = (measure) => {
  const work = distances(view, { measure, stages, scale });
  for (;;) { const step = work.next(); if (step.done) return step.value; }
};
const rotation = run("rotation"), angle = run("angle");
const { trails } = orbits(view, view, { a: 0, b: 1, stages, scale, probe: signs(2, d) });
console.log(JSON.stringify({ rotation: [...rotation.values], probes: rotation.probes,
  error: rotation.error, mean: meanDistance(rotation.values, E), angle: [...angle.values],
  ends: trails.map((trail) => trail.at(-1)), trail: trails[0] }));
"""


def node() -> str:
    """A JavaScript engine: the system's, or the one that playwright brings."""
    found = shutil.which("node")
    if found is None:
        driver = pytest.importorskip("playwright._impl._driver", reason="no node, no playwright")
        found = str(driver.compute_driver_executable()[0])
    return found


def run_script(source: str, **values) -> dict:
    """Run the explorer's mathematics with `source` behind it; its one line of JSON."""
    text = (assets.FOLDER / "orbit_math.js").read_text(encoding="utf-8")
    whole = text.replace("export ", "") + source
    done = subprocess.run(
        [node(), "-e", whole], input=json.dumps(values), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("experts", "d", "stages", "scale"), CASES, ids=IDS)
def test_javascript_computes_the_same_numbers(experts, d, stages, scale):
    angles = draw_angles(experts, d)
    count = angles.shape[1] if stages is None else stages
    found = run_script(
        HARNESS, angles=base64.b64encode(angles.tobytes()).decode(), E=experts, d=d,
        S=angles.shape[1], stages=count, scale=scale,
    )  # fmt: skip
    expected = orbits.distances(angles, d, stages=stages, scale=scale)
    values = np.reshape(found["rotation"], (experts, experts))
    np.testing.assert_allclose(values, expected.values, atol=1e-6)
    assert (found["probes"], found["error"]) == (expected.probes, expected.standard_error)
    assert found["mean"] == pytest.approx(expected.mean, abs=1e-6)
    expected = orbits.distances(angles, d, "angle", stages=stages, scale=scale)
    np.testing.assert_allclose(
        np.reshape(found["angle"], (experts, -1)), expected.values, atol=1e-9
    )
    probe = orbits.signs(range(2, 3), d)[0]
    trails = orbits.orbit(angles, angles, probe, 0, 1, stages=stages, scale=scale)
    np.testing.assert_allclose(found["ends"], trails[:, -1], atol=1e-9)
    np.testing.assert_allclose(found["trail"], trails[0], atol=1e-9)


def test_javascript_reads_every_float16():
    codes = np.arange(65536, dtype="<u2")
    source = """
    const bytes = Buffer.from(JSON.parse(require("fs").readFileSync(0, "utf8")).codes, "base64");
    const values = decodeHalf(new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength));
    console.log(JSON.stringify({ values: [...values].map(String) }));
    """
    found = run_script(source, codes=base64.b64encode(codes.tobytes()).decode())
    values = np.array([float(v.replace("Infinity", "inf")) for v in found["values"]])
    np.testing.assert_array_equal(values, codes.view("<f2").astype(np.float64))
