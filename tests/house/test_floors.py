"""The map of the house, and the test that keeps it true.

A room imports only from lower floors. Rooms of one floor do not import one another, except on the
top floor and where `NEIGHBOURS` says so.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# floor, rooms, what lives there
HOUSE = [
    (
        5,
        [
            "callbacks",
            "strategy",
            "cli",
            "cli_packed",
            "cli_export",
            "demo",
            "checkpoint",
            "calibrated",
            "widgets",
            "prepared",
            "selected",
            "selecting",
            "narrowing",
        ],
        "all that imports lightning",
    ),
    (4, ["plan"], "when: step -> lambda, angle factor, phase; parameter groups"),
    (3, ["swap", "calibrate", "deploy", "viz", "metrics", "data"], "wings, apart from one another"),
    (2, ["layers"], "nn.Modules: rotation, substrate, router, the layer"),
    (1, ["kernels"], "floor 0's functions, faster"),
    (0, ["functional", "config", "errors"], "pure functions of tensors, settings, errors"),
]
FLOOR = {room: floor for floor, rooms, _ in HOUSE for room in rooms}

# On one floor: who may be imported by whom. Mathematics never sees a config.
NEIGHBOURS = {("functional", "errors"), ("config", "errors")}

TOP = max(FLOOR.values())
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
# The low floors stay light: what they may import besides the standard library.
THIRD_PARTY = {
    "errors": set(),
    "config": {"torch", "typing_extensions"},
    "functional": {"torch", "jaxtyping", "typing_extensions"},
    "kernels": {"torch", "jaxtyping", "typing_extensions", "triton"},
    "layers": {"torch", "jaxtyping", "typing_extensions"},
}

NAME = "lightning_bfmoe"
LOADERS = {"import_module", "__import__"}
PACKAGE = Path(__file__).parents[2] / NAME


@dataclass(frozen=True)
class Import:
    """One imported module, wherever in the file it is imported."""

    module: str
    line: int
    lazy: bool  # inside a function


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """Every import of a syntax tree, function-level ones and `import_module("...")` included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            # `from lightning_bfmoe import layers` imports a room, not the door.
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (Import(name, node.lineno, lazy) for name in names)
        elif isinstance(node, ast.Call) and called(node) in LOADERS and node.args:
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str):
                yield Import(importlib.util.resolve_name(name, package), node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, package, inside)


def called(node: ast.Call) -> str:
    """The last part of the name that is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def faults(room: str, source: str, package: str) -> list[str]:
    """What a file of `room` imports that it must not; `room` "" is the door."""
    found = []
    for item in imports(ast.parse(source), package):
        top, _, rest = item.module.partition(".")
        target = rest.partition(".")[0]
        if top == NAME and target in FLOOR:
            allowed = may_import(room, target, item.lazy)
        elif top == NAME:  # a name of the door itself
            allowed = room == "" or FLOOR[room] == TOP or rest == "__version__"
        elif top in LIGHTNING:
            allowed = FLOOR.get(room) == TOP or (room == "" and item.lazy)
        else:
            light = THIRD_PARTY.get(room)
            allowed = light is None or top in light or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"line {item.line}: {room or 'the door'} must not import {item.module}")
    return found


def may_import(room: str, target: str, lazy: bool) -> bool:
    """Whether a room may import another room of the package."""
    if room == "":
        return lazy or FLOOR[target] < TOP
    if room == target or (room, target) in NEIGHBOURS:
        return True
    return FLOOR[target] < FLOOR[room] or FLOOR[target] == FLOOR[room] == TOP


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def test_every_room_has_its_floor():
    strangers = sorted({room_of(path) for path in files()} - set(FLOOR) - {""})
    assert not strangers, f"rooms without a floor: {strangers}; give each its place in HOUSE"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    package = ".".join([NAME, *path.relative_to(PACKAGE).parts[:-1]])
    assert faults(room_of(path), path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("functional", "from lightning_bfmoe.layers import ButterflyMoE"),
        ("functional", "from lightning_bfmoe import config"),
        ("functional", "import numpy"),
        ("layers", "def f():\n    from ..swap import swap_feed_forward"),
        ("swap", "from lightning_bfmoe.deploy.pack import pack"),
        ("swap", "from lightning_bfmoe import pack"),
        ("deploy", "def f():\n    import lightning as L"),
        ("deploy", "import importlib\nimportlib.import_module('lightning_bfmoe.callbacks')"),
        ("plan", "if True:\n    from pytorch_lightning.callbacks import Callback"),
        ("", "from lightning_bfmoe.callbacks import ButterflyMoECallback"),
    ],
)
def test_the_check_sees_a_fault(room, source):
    package = f"{NAME}.{room}".rstrip(".")
    assert len(faults(room, source, package)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("callbacks", "import lightning as L\nfrom lightning_bfmoe import pack, plan"),
        ("cli", "from lightning_bfmoe.callbacks import ButterflyMoECallback"),
        ("swap", "from ..layers import ButterflyMoE\nfrom . import find\nimport transformers"),
        ("functional", "import math\nimport torch\nfrom ..errors import ShapeError"),
        ("", "def f():\n    from lightning_bfmoe.callbacks import ButterflyMoECallback"),
    ],
)
def test_the_check_lets_good_imports_pass(room, source):
    package = f"{NAME}.{room}".rstrip(".")
    assert faults(room, source, package) == []
