"""A test must be able to fail: no answer is thrown away, no `raises` takes any error."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ANSWERS = {"allclose", "isclose", "equal", "array_equal", "array_equiv", "is_close"}
CATCHERS = {"raises", "warns"}


def last_name(node: ast.AST) -> str:
    """`allclose` for both `torch.allclose` and a bare `allclose`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def aliases(tree: ast.AST) -> set[str]:
    """Other names that a file gives to a closeness function, by assignment or by `import as`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and last_name(node.value) in ANSWERS:
            found |= {last_name(target) for target in node.targets}
        elif isinstance(node, ast.ImportFrom):
            found |= {name.asname for name in node.names if name.name in ANSWERS and name.asname}
    return found


def dishonest(source: str) -> list[str]:
    """The lines of a test file that look like a check and are none."""
    tree = ast.parse(source)
    answers = ANSWERS | aliases(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = last_name(node.value.func)
            if name in answers:
                found.append(f"line {node.lineno}: nobody reads what {name}(...) answers")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            found.append(f"line {node.lineno}: nobody reads this comparison")
        if isinstance(node, ast.Call) and last_name(node.func) in CATCHERS:
            match = [word.value for word in node.keywords if word.arg == "match"]
            empty = isinstance(match[0], ast.Constant) and not match[0].value if match else True
            if empty:
                found.append(f"line {node.lineno}: {last_name(node.func)} without match=")
    return found


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_every_check_can_fail(path):
    assert dishonest(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.allclose(a, b)",
        "np.testing.allclose(a, b)",
        "same = np.allclose\nsame(a, b)",
        "from torch import allclose as near\nnear(a, b)",
        "torch.equal(a, b)",
        "a == b",
        "with pytest.raises(ValueError):\n    f()",
        "with pytest.raises(ValueError, match=''):\n    f()",
        "pytest.raises(ValueError, f)",
        "with pytest.warns(UserWarning):\n    f()",
    ],
)
def test_the_check_sees_an_empty_check(source):
    assert len(dishonest(source)) == 1


def test_the_check_lets_honest_checks_pass():
    source = """
assert torch.allclose(a, b)
torch.testing.assert_close(a, b)
same = torch.equal(a, b)
with pytest.raises(ValueError, match="top_k"), pytest.warns(UserWarning, match=pattern):
    f()
"""
    assert dishonest(source) == []
