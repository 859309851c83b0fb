"""Files that can be read in one sitting, and a docstring on everything public."""

import ast
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_bfmoe"
MEDIAN_LINES, MAX_LINES = 200, 320
FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def undocumented(source: str) -> list[str]:
    """Public functions and classes at the top of a module that have no docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    return [n.name for n in nodes if not n.name.startswith("_") and not ast.get_docstring(n)]


def test_files_stay_short():
    long = {relative(path): lines(path) for path in FILES if lines(path) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}; one idea each"
    # A file of five lines or fewer is a door, not a text.
    typical = statistics.median([n for n in map(lines, FILES) if n > 5])
    assert typical <= MEDIAN_LINES


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_names_have_a_docstring(path):
    source = path.read_text(encoding="utf-8")
    assert undocumented(source) == []
    if source.strip() and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(source)), f"{relative(path)}: say what the file is for"


def test_the_check_sees_a_missing_docstring():
    source = 'def f():\n    """It does."""\ndef g(): ...\ndef _h(): ...\nclass K: ...\n'
    assert undocumented(source) == ["g", "K"]
