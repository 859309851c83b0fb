"""What a committed notebook must satisfy; each check returns the sentences that say what is wrong.

They read files and execute nothing, so they run on every change.
"""

import ast
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from notebooks.build import (
    BADGE_MARK,
    KERNEL,
    WIDGET_VIEW,
    colab_badge,
    find_repository,
    read_source,
)

MAX_BYTES = 1_500_000
PROMISE = "**At the end you have**"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|usr|opt|Users|mnt)/\w+|site-packages")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
SHOWN = {"image/png", "image/svg+xml", "text/html"}


def problems(source: Path, notebook: Path) -> list[str]:
    """Everything that is wrong with a source and its notebook; empty when all is well."""
    if not notebook.exists():
        return ["not built: python notebooks/build.py " + source.stem[:2]]
    fresh, built = read_source(source), nbformat.read(notebook, as_version=4)
    return [
        *drift(fresh, built),
        *bad_outputs(built),
        *stored_state(built),
        *machine_traces(built),
        *too_large(notebook),
        *bad_frame(built, source.stem),
        *own_layers(source.read_text(encoding="utf-8")),
    ]


def drift(fresh: NotebookNode, built: NotebookNode) -> list[str]:
    """The cells of the notebook are those of the source."""
    sides = [
        [(cell.cell_type, cell.source.strip()) for cell in side.cells] for side in (fresh, built)
    ]
    if sides[0] == sides[1]:
        return []
    pairs = enumerate(zip(*sides, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(map(len, sides)))
    return [f"cell {first} differs from the source: run make notebooks"]


def bad_outputs(built: NotebookNode) -> list[str]:
    """Every code cell was executed, none failed, and a widget left something to see."""
    found = []
    for number, cell in enumerate(built.cells):
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        kinds = {mime for output in cell.outputs for mime in output.get("data", {})}
        if any(o.output_type == "error" for o in cell.outputs) and "raises-exception" not in tags:
            found.append(f"cell {number} failed")
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"cell {number} was not executed")
        if "widget" in tags and not kinds & SHOWN:
            found.append(f"cell {number} is tagged widget but shows no picture without a kernel")
    counts = [c.execution_count for c in built.cells if c.cell_type == "code" and c.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        found.append("the cells were not executed once, in order, in a fresh kernel")
    if not any("image/png" in o.get("data", {}) for c in built.cells for o in c.get("outputs", [])):
        found.append("no picture is stored, so GitHub would show none")
    return found


def stored_state(built: NotebookNode) -> list[str]:
    """Nothing that belongs to one kernel or one front end is kept."""
    found = []
    if dict(built.metadata) != {"kernelspec": KERNEL, "language_info": {"name": "python"}}:
        found.append(f"metadata beside the kernel's name: {sorted(built.metadata)}")
    for number, cell in enumerate(built.cells):
        extra = set(cell.metadata) - {"tags", "jupyter"}
        if extra:
            found.append(f"cell {number} keeps metadata {sorted(extra)}")
        if any(WIDGET_VIEW in output.get("data", {}) for output in cell.get("outputs", [])):
            found.append(f"cell {number} keeps a widget that needs a kernel")
    return found


def machine_traces(built: NotebookNode) -> list[str]:
    """No path and no memory address of the machine that executed it."""
    found = []
    for number, cell in enumerate(built.cells):
        texts = [cell.source]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += [str(data[mime]) for mime in ("text/plain", "text/html") if mime in data]
            texts += [output.get("text", "")]
        for text in texts:
            trace = MACHINE_PATH.search(text) or ADDRESS.search(text)
            if trace is not None:
                found.append(f"cell {number} holds {trace.group()!r}")
    return found


def too_large(notebook: Path) -> list[str]:
    """GitHub shows a notebook of this size without being asked twice."""
    size = notebook.stat().st_size
    return [f"{size / 1e6:.2f} MB, more than {MAX_BYTES / 1e6} MB"] if size > MAX_BYTES else []


def bad_frame(built: NotebookNode, name: str, repository: str | None = None) -> list[str]:
    """It says first what the reader will have, asserts it last, and opens in Colab if published."""
    found, first = [], built.cells[0]
    if first.cell_type != "markdown" or PROMISE not in first.source:
        found.append(f"the first cell is a text that says {PROMISE}")
    repository = find_repository() if repository is None else repository
    badge = colab_badge(repository, name) if repository else BADGE_MARK
    if badge not in first.source:
        found.append(f"the first cell holds no {badge}")
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    setup = f'REPOSITORY = "{repository}"', "google.colab"
    if not all(words in code[0].source for words in setup):
        found.append("the first code cell is the guarded install for Colab")
    if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code[-1].source))):
        found.append("the last code cell asserts what was promised")
    return found


def own_layers(source: str) -> list[str]:
    """No notebook defines a layer: what is taught is what is installed.

    A LightningModule (the reader's own training code) is allowed, an `nn.Module` is not.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
        names = {base.rpartition(".")[2] for base in bases}
        if names & {"Module", "Function"} or any("Butterfly" in name for name in names):
            found.append(f"class {node.name}({', '.join(bases)}) is a layer of its own")
    return found
