"""The lower floors import without the heavy libraries, and never load them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["lightning", "pytorch_lightning", "matplotlib", "triton", "transformers", "datasets"]

# room: the heavy libraries without which it must import
ROOMS = {
    "": HEAVY,
    "functional": HEAVY,
    "config": HEAVY,
    "errors": HEAVY,
    "kernels": HEAVY,
    "layers": HEAVY,
    "swap": HEAVY,
    "calibrate": HEAVY,
    "deploy": HEAVY,
    "plan": HEAVY,
    "data": ["lightning", "pytorch_lightning", "matplotlib", "triton", "transformers"],
    # torchmetrics itself imports matplotlib and transformers where they are installed.
    "metrics": ["lightning", "pytorch_lightning", "triton", "datasets"],
    "viz": ["lightning", "pytorch_lightning", "triton", "transformers", "datasets"],
}

BLOCK = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Block())
importlib.import_module({module!r})
"""

LOAD = """
import importlib, sys
import torch, jaxtyping
before = set(sys.modules)
importlib.import_module({module!r})
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}} & set({heavy!r})
sys.exit(f"importing {module} loads {{sorted(loaded)}}" if loaded else 0)
"""


def module_name(room: str) -> str:
    return f"lightning_bfmoe.{room}".rstrip(".")


def present() -> list[str]:
    """The rooms that are built; a room that is planned joins the test with its first file."""
    package = ROOT / "lightning_bfmoe"
    found = [r for r in ROOMS if (package / r / "__init__.py").exists()]
    return found + [r for r in ROOMS if r and (package / f"{r}.py").exists()]


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("room", present(), ids=module_name)
def test_imports_without_the_heavy_libraries(room):
    run(BLOCK.format(module=module_name(room), blocked=set(ROOMS[room])))


@pytest.mark.parametrize("room", present(), ids=module_name)
def test_loads_no_heavy_library(room):
    run(LOAD.format(module=module_name(room), heavy=ROOMS[room]))


def test_the_block_blocks():
    with pytest.raises(AssertionError, match="blocked"):
        run(BLOCK.format(module="lightning", blocked={"lightning"}))
