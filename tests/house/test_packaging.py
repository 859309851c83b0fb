"""The wheel holds the package and the recipes and nothing else; the version is said once."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_bfmoe

ROOT = Path(__file__).parents[2]


def build(kind: str, out: Path, **environment: str) -> tuple[Path, str]:
    """A wheel or sdist built here, without isolation, so without a network; and what was said."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("lightning_bfmoe-*")
    return path, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names inside a wheel, with compiled kernels where there is a compiler."""
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("dist"))[0])


def compiled_in(names: list[str]) -> list[str]:
    return [name for name in names if Path(name).suffix in {".so", ".dylib", ".dll"}]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_compiler_makes_a_wheel_for_this_platform(wheel):
    (library,) = compiled_in(wheel.namelist())
    assert library.startswith("lightning_bfmoe/kernels/_bfmoe_cpu.")
    assert Path(wheel.filename).stem.split("-")[2:4] == ["py3", "none"]
    assert not wheel.filename.endswith("-any.whl")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"BFMOE_NO_COMPILE": "1"}, "BFMOE_NO_COMPILE is set"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"CXX": sys.executable}, "failed: no message"),
    ],
)
def test_without_a_compiler_the_wheel_is_plain_python(tmp_path, environment, reason):
    path, said = build("wheel", tmp_path, **environment)
    assert path.name.endswith("-py3-none-any.whl") and reason in said
    assert compiled_in(zipfile.ZipFile(path).namelist()) == []


def test_the_sdist_holds_the_source_of_the_kernels_and_nothing_compiled(tmp_path):
    with tarfile.open(build("sdist", tmp_path)[0]) as sdist:
        names = sdist.getnames()
    assert compiled_in(names) == []
    tops = {name.split("/", 1)[1] for name in names}
    assert {"hatch_build.py", "csrc/rotate.cpp", "csrc/stages.inc"} <= tops


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


def test_the_wheel_holds_what_the_widgets_are_made_of(wheel):
    folder = "lightning_bfmoe/viz/static/"
    shipped = {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}
    assert shipped == relative_files(ROOT / folder, "*")
    assert {Path(name).suffix for name in shipped} == {".js", ".css"}


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
