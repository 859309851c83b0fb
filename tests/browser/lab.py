"""Finds a Chromium and starts a JupyterLab, for the tests and for the gallery."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

HOW = "Run: make browser (installs jupyterlab, playwright and a Chromium)"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # proves that no network is needed
]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """A Chromium: ``BFMOE_BROWSER``, the system's, or the one that playwright installed."""
    given = os.environ.get("BFMOE_BROWSER")
    if given:
        return given
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and find_spec("playwright") is not None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            path = playwright.chromium.executable_path
        found = path if Path(path).is_file() else None
    return found


def missing() -> list[str]:
    """What these tests lack, by name."""
    modules = ("playwright", "jupyterlab", "anywidget")
    lacking = [f"the Python package {name}" for name in modules if find_spec(name) is None]
    return lacking or ([] if find_browser() else [f"a browser (none of {', '.join(NAMES)})"])


@contextlib.contextmanager
def run_lab(root: Path, own: Path, theme: str = "JupyterLab Light") -> Iterator[str]:
    """A JupyterLab over `root`, with settings, kernels and history in `own`; its address."""
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    settings = own / "app_settings"
    settings.mkdir()
    overrides = {
        "@jupyterlab/apputils-extension:notification": quiet,
        "@jupyterlab/apputils-extension:themes": {"theme": theme},
    }
    (settings / "overrides.json").write_text(json.dumps(overrides))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = os.environ | {f"JUPYTER_{name}": str(own / name.lower()) for name in names}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(own / "lab"), "IPYTHONDIR": str(own / "ipython")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    with (own / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
             f"--port={port}", "--port-retries=0", "--IdentityProvider.token=",
             f"--ServerApp.root_dir={root}", f"--LabApp.app_settings_dir={settings}"],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server, own / "log.txt")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=10)
            server.kill()


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            direct.open(url, timeout=2)
            return
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of code cells that nobody has run."""
    import nbformat  # it comes with JupyterLab

    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    code = [nbformat.v4.new_code_cell(source.strip()) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=kernel), path)
