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
from typing import TypedDict

HOW = "Run: make browser (installs jupyterlab, playwright and a Chromium)"
REPORT = Path(sys.prefix) / "browser-tools.json"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # proves that no network is needed
]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Report(TypedDict):
    """What `tests.browser.tools` found: a browser that starts, or what was tried in vain."""

    browser: str | None
    words: str
    tried: list[str]
    broken: list[str]


def read_report() -> Report | None:
    """The report of the last `make browser-tools` in this environment."""
    return json.loads(REPORT.read_text()) if REPORT.is_file() else None


def systems() -> str | None:
    """The Chromium of the system."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def playwrights_own() -> str | None:
    """The Chromium that playwright has downloaded."""
    if find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def find_browser() -> str | None:
    """A Chromium: ``BFMOE_BROWSER``, the one that `tools` has tried, the system's, playwright's."""
    given, report = os.environ.get("BFMOE_BROWSER"), read_report()
    if given:
        return given
    if report and report["browser"] and Path(report["browser"]).is_file():
        return report["browser"]
    broken = report["broken"] if report else []
    found = (find() for find in (systems, playwrights_own))
    return next((path for path in found if path and path not in broken), None)


def missing() -> str:
    """Why these tests cannot run here, with what was tried; "" when they can."""
    modules = ("playwright", "jupyterlab", "anywidget")
    lacking = [f"the Python package {name}" for name in modules if find_spec(name) is None]
    if not lacking and not find_browser():
        lacking = [f"a browser (none of {', '.join(NAMES)}, nor playwright's)"]
    if not lacking:
        return ""
    report = read_report()
    tried = f" Tried: {'; '.join(report['tried'])}." if report and report["tried"] else ""
    return f"browser tests need {' and '.join(lacking)}.{tried} {HOW}."


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
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "BFMOE_QUICK": "1"}
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
