"""Notebook 05 as a reader uses it: opened in JupyterLab, run, and its widgets moved."""

import re

import nbformat
import pytest

from lightning_bfmoe.viz import read_recording
from notebooks.build import read_source, sources
from tests.browser.test_explorer_live import exercise

pytestmark = pytest.mark.slow

KEEP = "recording.write('05.safetensors')"  # the notebook's own folder goes with it
SHOWN = ".jp-OutputArea-output"


def test_notebook_05_runs_and_its_widgets_answer(watched, lab):
    address, root = lab
    notebook = read_source(*sources(["05"]), repository="")  # a badge would come from outside
    notebook.cells.append(nbformat.v4.new_code_cell(KEEP))
    nbformat.write(notebook, root / "05.ipynb")
    page = watched.page
    page.goto(f"{address}/lab/tree/05.ipynb?reset")
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('.lm-Menu-item:has-text("Run All Cells")').first.click()
    page.wait_for_selector(f"{SHOWN} :text('All promises kept.')", timeout=200_000)
    page.locator(".bfm-heatmap").scroll_into_view_if_needed()
    exercise(page, read_recording(root / "05.safetensors"))

    sentence = page.get_by_label("sentence")
    sentence.scroll_into_view_if_needed()
    sentence.fill("to \u20ac")
    sentence.press("Enter")
    tokens = page.locator(".bfm-token")
    page.wait_for_function("document.querySelectorAll('.bfm-token').length === 6")  # bytes
    for told in tokens.evaluate_all("found => found.map(token => token.title)"):
        weights = [int(share) for share in re.findall(r"expert \d: (\d+)%", told)]
        assert len(weights) == 2 and sum(weights) == pytest.approx(100, abs=1), told

    expert = page.locator("g.expert").nth(3)
    expert.scroll_into_view_if_needed()
    expert.focus()  # what Tab does
    tip = page.locator("g.tip.t3")
    tip.wait_for(state="visible")
    assert "expert 3:" in tip.text_content()
    watched.assert_clean()
