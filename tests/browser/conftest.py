"""A real Chromium and a real JupyterLab, both without a network."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def browser():
    """A browser context that reaches 127.0.0.1 only."""
    lacking = missing()
    if lacking:
        message = f"browser tests need {' and '.join(lacking)}. {HOW}."
        if os.environ.get("BFMOE_BROWSER_REQUIRED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=find_browser(), headless=True, args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        context.set_default_timeout(45_000)
        yield context
        context.close()


class Watched:
    """A page, and what it complained about or asked of the outside."""

    def __init__(self, context):
        self.page = context.new_page()
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._see)

    def _hear(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    def _see(self, request):
        local = ("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "data:", "blob:")
        if not request.url.startswith(local):
            self.outside.append(request.url)

    def assert_clean(self):
        assert self.errors == [] and self.outside == []


@pytest.fixture
def watched(browser):
    """A fresh page that is watched."""
    tab = Watched(browser)
    yield tab
    tab.page.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """Address and folder of a JupyterLab with settings, kernels and history of its own."""
    root, own = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    settings = own / "app_settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(
        json.dumps({"@jupyterlab/apputils-extension:notification": quiet})
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = os.environ | {f"JUPYTER_{name}": str(own / name.lower()) for name in names}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(own / "lab"), "IPYTHONDIR": str(own / "ipython")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    log = (own / "log.txt").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
         f"--port={port}", "--port-retries=0", "--IdentityProvider.token=",
         f"--ServerApp.root_dir={root}", f"--LabApp.app_settings_dir={settings}"],
        env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api", server, own / "log.txt")
        yield address, root
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)
        server.kill()
        log.close()


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2)
            return
        time.sleep(0.1)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")
