"""Executes ``notebooks/src/*.py`` (percent format) into the committed ``notebooks/*.ipynb``.

The ``.py`` file is the source: it is reviewed, linted and edited. The ``.ipynb`` is what a reader
opens; it is built here and never edited by hand. What is written depends on the source and its
printed results alone: no widget state, no times, no kernel version, no progress bars.

    python notebooks/build.py                     # all, in full
    python notebooks/build.py 02 05               # some, by the start of their names
    python notebooks/build.py --quick --out DIR   # what the test suite does
    python notebooks/build.py --text              # only texts, comments have changed: keep outputs
    python notebooks/build.py --check             # is what is committed in order? runs nothing
"""

import argparse
import io
import os
import re
import sys
import time
import tokenize
from collections.abc import Iterable
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "src"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
BADGE_MARK = "<!-- colab -->"
NO_REPOSITORY = 'REPOSITORY = ""'
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def sources(names: Iterable[str] = ()) -> list[Path]:
    """The source files whose names start with one of `names`; all when there is none."""
    wanted = tuple(names)
    found = sorted(path for path in SOURCES.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not wanted or path.name.startswith(wanted)]


def target(source: Path) -> Path:
    """Where the committed notebook of a source stands."""
    return FOLDER / f"{source.stem}.ipynb"


def find_repository(pyproject: Path = FOLDER.parent / "pyproject.toml") -> str:
    """Where the project is published: ``Repository`` of ``[project.urls]``; "" when nowhere."""
    line = re.compile(r'^Repository = "(https://github\.com/[\w.-]+/[\w.-]+)"', re.M)
    found = line.search(pyproject.read_text(encoding="utf-8"))
    return found.group(1) if found else ""


def colab_badge(repository: str, name: str) -> str:
    """A badge that opens the published notebook in Colab."""
    colab = repository.replace("https://github.com/", "https://colab.research.google.com/github/")
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({picture})]({colab}/blob/main/notebooks/{name}.ipynb)"


def read_source(source: Path, repository: str | None = None) -> NotebookNode:
    """A notebook without outputs, ids and metadata as they will be written.

    Args:
        source: Percent format.
        repository: Address of the published repository, for the badge and the set-up cell; "" for
            none, so that no link leads nowhere. None takes that of pyproject.toml.
    """
    repository = find_repository() if repository is None else repository
    text = source.read_text(encoding="utf-8")
    if repository:
        text = text.replace(BADGE_MARK, colab_badge(repository, source.stem))
        text = text.replace(NO_REPOSITORY, f'REPOSITORY = "{repository}"')
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's memory of blank lines
    return notebook


def execute(notebook: NotebookNode, *, quick: bool = False, timeout: int = 600) -> NotebookNode:
    """Run all cells in a fresh kernel whose working directory is ``notebooks/``.

    Args:
        notebook: Changed in place.
        quick: Sets ``BFMOE_QUICK=1``: the same cells on tiny models.
        timeout: Seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment["BFMOE_QUICK"] = "1" if quick else "0"
    # torch with more threads than free cores slows down tenfold; one is what the results are from
    environment.setdefault("OMP_NUM_THREADS", "1")
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=environment)
    return notebook


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop what a rebuild would change, or a viewer without a kernel could not show; in place."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            kept = (_clean_output(output) for output in cell.outputs)
            cell.outputs = _joined([output for output in kept if output is not None])
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Printed text in one piece; where a kernel cuts it depends on the time of day."""
    result: list[NotebookNode] = []
    for output in outputs:
        if result and output.output_type == result[-1].output_type == "stream":
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output.text = _plain(output.text)
        return output if output.text.strip() else None
    if "data" in output:
        # progress bars and bare sliders leave nothing that could be seen
        if output.data.pop(WIDGET_VIEW, None) is not None and set(output.data) <= {"text/plain"}:
            return None
        output.metadata.pop(WIDGET_VIEW, None)
        if "text/plain" in output.data:
            output.data["text/plain"] = _plain(output.data["text/plain"])
    return output


def _plain(text: str) -> str:
    """Text without colours, and of a line that was overwritten the last state."""
    lines = ANSI.sub("", text).split("\n")
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)


def build(source: Path, out: Path, *, quick: bool = False, timeout: int = 600) -> float:
    """Execute one source and write its notebook; returns the seconds that the execution took."""
    notebook, start = read_source(source), time.perf_counter()
    execute(notebook, quick=quick, timeout=timeout)
    seconds = time.perf_counter() - start
    partial = out.with_name(f".{out.name}.partial")
    try:
        nbformat.write(clean(notebook), partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return seconds


def refresh_text(source: Path, out: Path) -> bool:
    """Take over texts and comments, execute nothing; False when code changed or none is built."""
    if not out.exists():
        return False
    fresh, built = read_source(source), nbformat.read(out, as_version=4)
    ours, theirs = (
        [cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (fresh, built)
    )
    if [_lasting(cell.source) for cell in ours] != [_lasting(cell.source) for cell in theirs]:
        return False
    for cell, executed in zip(ours, theirs, strict=True):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    nbformat.write(clean(fresh), out)
    return True


def _lasting(code: str) -> list[tuple[int, str]]:
    """What a cell executes: its tokens, without comments and the address of the repository."""
    code = re.sub(r'^REPOSITORY = ".*?"', NO_REPOSITORY, code, flags=re.M)
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    silent = (tokenize.COMMENT, tokenize.NL)  # neither changes an output
    return [(token.type, token.string) for token in tokens if token.type not in silent]


def main() -> int:
    """Build or check; returns the exit status."""
    sys.path.insert(0, str(FOLDER.parent))
    from notebooks.checks import problems

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="starts of names, as in: 00 05")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few seconds each")
    parser.add_argument("--out", type=Path, help="folder to write to instead of notebooks/")
    parser.add_argument("--text", action="store_true", help="execute only where code has changed")
    parser.add_argument("--check", action="store_true", help="execute nothing")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    args = parser.parse_args()
    chosen, bad = sources(args.names), 0
    if not chosen:
        parser.error(f"no source in {SOURCES} starts with {args.names}")
    if args.quick and args.out is None and not args.check:
        parser.error("--quick needs --out: committed notebooks are built in full")
    for source in chosen:
        out = target(source) if args.out is None else args.out / f"{source.stem}.ipynb"
        if args.text and refresh_text(source, out):
            print(f"{out.name}: texts only")
        elif not args.check:
            out.parent.mkdir(parents=True, exist_ok=True)
            seconds = build(source, out, quick=args.quick, timeout=args.timeout)
            print(f"{out.name}: {seconds:.0f} s, {out.stat().st_size / 1000:.0f} kB", flush=True)
        found = problems(source, out)
        bad += len(found)
        for problem in found:
            print(f"{out.name}: {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
