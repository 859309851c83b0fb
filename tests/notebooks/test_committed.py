"""The committed notebooks are what their sources say, and show it without a kernel."""

import re
import shutil

import nbformat
import pytest

from notebooks import build, checks
from notebooks.build import (
    FOLDER,
    SOURCES,
    clean,
    read_source,
    refresh_text,
    sources,
    target,
)

ALL = sources()
BY_NAME = {"argvalues": ALL, "ids": [path.stem for path in ALL]}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


@pytest.mark.parametrize("source", **BY_NAME)
def test_is_in_order(source):
    assert checks.problems(source, target(source)) == []


@pytest.mark.parametrize("source", **BY_NAME)
def test_every_link_leads_to_a_file(source):
    text = "\n".join(cell.source for cell in read_source(source).cells)
    targets = [link.partition("#")[0] for link in LINK.findall(text)]
    assert [link for link in targets if not (FOLDER / link).exists()] == []


def test_every_notebook_has_a_source():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in ALL}
    assert sorted(SOURCES.glob("*.py")) == ALL


def test_all_begin_with_the_same_setup():
    cells = {next(c.source for c in read_source(s).cells if c.cell_type == "code") for s in ALL}
    assert len(cells) == 1


def notebook(*cells):
    """A built notebook of code cells: (source, outputs)."""
    built = nbformat.v4.new_notebook()
    for number, (source, outputs) in enumerate(cells, start=1):
        cell = nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=number)
        built.cells.append(cell)
    return clean(built)


PICTURE = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
SLIDER = {"text/plain": "IntSlider()", checks.WIDGET_VIEW: {"model_id": "1"}}
FAILED = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
ALL_WELL = [("x = 1", [PICTURE])]


def test_a_notebook_in_order_passes():
    built = notebook(*ALL_WELL)
    assert (
        checks.bad_outputs(built) + checks.stored_state(built) + checks.machine_traces(built) == []
    )


@pytest.mark.parametrize(
    ("check", "cells", "problem"),
    [
        (checks.bad_outputs, [("x", [FAILED, PICTURE])], "cell 0 failed"),
        (checks.bad_outputs, [("x", [])], "no picture is stored"),
        (
            checks.machine_traces,
            [("x", [nbformat.v4.new_output("stream", text="in /home/me/x")])],
            "'/home/me'",
        ),
        (
            checks.machine_traces,
            [
                (
                    "x",
                    [
                        nbformat.v4.new_output(
                            "display_data", {"text/plain": "<f at 0x7f0011223344>"}
                        )
                    ],
                )
            ],
            "at 0x7f",
        ),
    ],
)
def test_a_check_sees(check, cells, problem):
    (found,) = check(notebook(*cells))
    assert problem in found


def test_a_cell_that_was_not_executed_is_seen():
    built = notebook(*ALL_WELL)
    built.cells[0].execution_count = None
    assert any("not executed" in found for found in checks.bad_outputs(built))


def test_a_widget_leaves_a_picture_or_is_reported():
    slider = nbformat.v4.new_output("display_data", dict(SLIDER))
    built = notebook(*ALL_WELL, ("slider", [slider]))
    assert built.cells[1].outputs == [], "a bare slider shows nothing without a kernel"
    built.cells[1].metadata.tags = ["widget"]
    assert any("tagged widget" in found for found in checks.bad_outputs(built))
    both = nbformat.v4.new_output("display_data", {**SLIDER, "image/png": "iVBORw0KGgo="})
    kept = notebook(("explorer", [both])).cells[0].outputs[0]
    assert set(kept.data) == {"text/plain", "image/png"}


def test_stored_state_is_seen():
    built = notebook(*ALL_WELL)
    built.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    built.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    assert len(checks.stored_state(built)) == 2


def test_drift_is_seen():
    fresh, built = notebook(("a = 1", []), ("b = 2", [])), notebook(("a = 1", []), ("b = 3", []))
    assert checks.drift(fresh, built) == ["cell 1 differs from the source: run make notebooks"]
    assert checks.drift(fresh, notebook(("a = 1", [])))[0].startswith("cell 1 differs")
    assert checks.drift(fresh, fresh) == []


def test_a_missing_or_large_notebook_is_seen(tmp_path):
    source, copy = ALL[0], tmp_path / "copy.ipynb"
    assert "not built" in checks.problems(source, copy)[0]
    shutil.copy(target(source), copy)
    with copy.open("a") as file:
        file.write(" " * checks.MAX_BYTES)
    assert "MB, more than" in checks.too_large(copy)[0]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("class A(nn.Module): ...", True),
        ("class A(torch.nn.Module, Mixin): ...", True),
        ("class A(ButterflyMoE): ...", True),
        ("class A(torch.autograd.Function): ...", True),
        ("class A(L.LightningModule): ...\nclass B(L.Callback): ...\nclass C: ...", False),
    ],
)
def test_a_layer_of_its_own_is_seen(code, wrong):
    assert bool(checks.own_layers(code)) is wrong


def test_the_frame_is_checked():
    built = notebook(("print(1)", [PICTURE]))
    assert len(checks.bad_frame(built, "00_x")) == 4


SETUP = """# %% [markdown]
# # A
# <!-- colab -->
# **At the end you have** it

# %%
REPOSITORY = ""  # written by build.py
"google.colab"

# %%
assert True
"""
PUBLISHED = "https://github.com/someone/lightning-bfmoe"


def test_a_badge_is_shown_when_the_project_is_published(tmp_path):
    source = tmp_path / "00_x.py"
    source.write_text(SETUP)
    private, public = read_source(source, ""), read_source(source, PUBLISHED)
    assert "http" not in private.cells[0].source + private.cells[1].source
    link = "colab.research.google.com/github/someone/lightning-bfmoe/blob/main/notebooks/00_x.ipynb"
    assert f"]({'https://' + link})" in public.cells[0].source
    assert f'REPOSITORY = "{PUBLISHED}"' in public.cells[1].source
    assert checks.bad_frame(private, "00_x", "") == []
    assert checks.bad_frame(public, "00_x", PUBLISHED) == []
    assert len(checks.bad_frame(private, "00_x", PUBLISHED)) == 2


def test_the_address_is_set_in_one_place(tmp_path, monkeypatch):
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\nname = "x"\n# Repository = "https://github.com/no/no"\n')
    assert build.find_repository(pyproject) == ""
    pyproject.write_text(f'[project.urls]\nRepository = "{PUBLISHED}"\n')
    assert build.find_repository(pyproject) == PUBLISHED


def test_publishing_keeps_the_outputs(tmp_path, monkeypatch):
    source, out = tmp_path / "00_x.py", tmp_path / "00_x.ipynb"
    source.write_text(SETUP)
    built = read_source(source, "")
    for number, cell in enumerate(built.cells[1:], start=1):
        cell.outputs, cell.execution_count = [PICTURE], number
    nbformat.write(built, out)
    monkeypatch.setattr(build, "find_repository", lambda: PUBLISHED)
    assert refresh_text(source, out)
    again = nbformat.read(out, as_version=4)
    assert PUBLISHED in again.cells[1].source and again.cells[1].outputs == [PICTURE]


def test_texts_are_refreshed_and_changed_code_is_not(tmp_path):
    source, out = tmp_path / "00_x.py", tmp_path / "00_x.ipynb"
    source.write_text("# %% [markdown]\n# old\n\n# %%\nx = 1\n")
    assert not refresh_text(source, out), "nothing is built yet"
    built = read_source(source)
    built.cells[1].outputs, built.cells[1].execution_count = [PICTURE], 1
    nbformat.write(built, out)
    source.write_text("# %% [markdown]\n# new\n\n# %%\nx = 1\n")
    assert refresh_text(source, out)
    again = nbformat.read(out, as_version=4)
    assert again.cells[0].source == "new" and again.cells[1].outputs == [PICTURE]
    source.write_text("# %%\nx = 2\n")
    assert not refresh_text(source, out)


def test_printed_text_is_joined():
    pieces = [nbformat.v4.new_output("stream", text=text) for text in ("a\n", "b\n")]
    built = notebook(("x", [*pieces, PICTURE, nbformat.v4.new_output("stream", text="c\n")]))
    assert [output.get("text") for output in built.cells[0].outputs] == ["a\nb\n", None, "c\n"]


def test_colours_and_overwritten_lines_go():
    text = "step 1\rstep 2\n\x1b[31mred\x1b[0m\n"
    built = notebook(("x", [nbformat.v4.new_output("stream", text=text)]))
    assert built.cells[0].outputs[0].text == "step 2\nred\n"
