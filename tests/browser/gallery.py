"""The screenshots of docs/images: ``python -m tests.browser.gallery``, about five minutes.

Trains the example's GPT for 300 steps on Shakespeare, opens the widgets in JupyterLab, light and
dark, and photographs each. Look at them before you commit them.
"""

import tempfile
from pathlib import Path

import lightning as L
import torch

from examples.gpt import GPT
from examples.settings import Settings
from examples.text_data import TextData
from lightning_bfmoe import (
    ActivationOutliers,
    ButterflyMoECallback,
    NotebookMonitor,
    OrbitRecorder,
    OutlierDashboard,
)
from tests.browser.lab import FLAGS, find_browser, run_lab, write_notebook

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SETUP = """
import torch
from tokenizers import Tokenizer
from examples.gpt import GPT
from lightning_bfmoe import ExpertMap, MemoryPlanner, OrbitExplorer, RoutingView, swap_feed_forward
tokenizer, saved = Tokenizer.from_file("tokenizer.json"), torch.load("model.pt")
model = GPT(vocab_size=512, context=64, width=64, depth=2, heads=2)
swap_feed_forward(model, num_experts=8, top_k=2, balance_rate=0.01)
_ = model.load_state_dict(saved["model"])
"""
WIDGETS = {
    "explorer": 'OrbitExplorer("orbits.safetensors", layer="blocks.1.mlp", b=3)',
    "routing": 'RoutingView(model, tokenizer, "To be, or not to be: that is the question.")',
    "map": 'ExpertMap(model, tokenizer, saved["text"], layer="blocks.1.mlp")',
    "planner": "MemoryPlanner(768, 3072, 64, layers=12)",
}


def train(folder: Path) -> None:
    """A small model, its recording, and the two live charts."""
    data = TextData(
        corpus=Settings().corpus_name, tokenizer="bpe", vocab_size=512, context=64, batch_size=8
    )
    L.seed_everything(0)
    model = GPT(vocab_size=512, context=64, width=64, depth=2, heads=2, learning_rate=2e-3)
    recorder = OrbitRecorder(every_n_steps=25, dirpath=str(folder))
    monitor, dashboard = NotebookMonitor(), OutlierDashboard()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, val_check_interval=50, limit_val_batches=8,
        callbacks=[
            ButterflyMoECallback(8, 2, angle_std=0.05, balance_rate=0.01), recorder,
            ActivationOutliers(25, hadamard=True), dashboard, monitor,
        ],
    )  # fmt: skip
    trainer.fit(model, data.train_batches(300, seed=0), data.val_dataloader())
    saved = {"model": model.state_dict(), "text": data.text.validation[:12_000]}
    torch.save(saved, folder / "model.pt")
    data.tokenizer.save(folder / "tokenizer.json")
    monitor.figure().savefig(IMAGES / "notebook-monitor.png", dpi=100)
    dashboard.figure().savefig(IMAGES / "outlier-dashboard.png", dpi=90)


def photograph(folder: Path, theme: str, ending: str) -> None:
    """One picture of each widget."""
    from playwright.sync_api import sync_playwright

    write_notebook(folder / "gallery.ipynb", [SETUP, *WIDGETS.values()])
    with (
        tempfile.TemporaryDirectory() as own,
        run_lab(folder, Path(own), theme) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 2600})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/lab/tree/gallery.ipynb?reset")
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
        page.keyboard.press("Control+b")  # no file browser beside it
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator('.lm-Menu-item:has-text("Run All Cells")').first.click()
        for selector in (".bfm-table", ".bfm-tokens", ".bfm-readout[data-distance]"):
            page.wait_for_selector(selector)
        page.wait_for_selector(".bfm-explorer:not([aria-busy])")
        outputs = page.locator(".jp-OutputArea-output").all()
        for name, output in zip(WIDGETS, outputs, strict=True):
            output.scroll_into_view_if_needed()
            if name == "map":
                page.locator("g.expert").nth(3).hover()
            output.screenshot(path=IMAGES / f"widget-{name}{ending}.png")
        browser.close()


def main() -> None:
    """Make all pictures."""
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
        photograph(Path(folder), "JupyterLab Light", "")
        photograph(Path(folder), "JupyterLab Dark", "-dark")


if __name__ == "__main__":
    main()
