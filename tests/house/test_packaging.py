"""The wheel holds the package and the recipes and nothing else; the version is said once."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_bfmoe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names inside a wheel built here, without isolation and so without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def relative_files(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


def test_the_wheel_holds_every_module(wheel):
    written = relative_files(ROOT / "lightning_bfmoe", "*.py")
    modules = {f"lightning_bfmoe/{name}" for name in written}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules


def test_the_wheel_holds_the_recipes(wheel):
    shipped = {name for name in wheel.namelist() if name.startswith("lightning_bfmoe/recipes/")}
    recipes = relative_files(ROOT / "callbacks", "*")
    assert shipped == {f"lightning_bfmoe/recipes/{name}" for name in recipes}
    assert recipes, "the top-level folder callbacks/ is empty"


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"lightning_bfmoe", f"lightning_bfmoe-{lightning_bfmoe.__version__}.dist-info"}


def test_the_recipe_folder_holds_no_python():
    # It would be importable as `callbacks` from the checkout and give every class a double.
    assert relative_files(ROOT / "callbacks", "*.py") == set()


def test_the_wheel_carries_the_licence_and_the_command(wheel):
    info = f"lightning_bfmoe-{lightning_bfmoe.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "bfmoe = lightning_bfmoe.cli:main" in entry_points


def test_the_version_is_the_same_everywhere():
    version = lightning_bfmoe.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert importlib.metadata.version("lightning-bfmoe") == version
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [version]


def test_torch_is_the_first_constraint():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version .*)?", pin) for pin in pins)
