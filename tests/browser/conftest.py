"""A real Chromium and a real JupyterLab, both without a network."""

import os
import tempfile

import pytest

from tests.browser.lab import FLAGS, find_browser, missing, run_lab


@pytest.fixture(scope="session")
def browser():
    """A browser context that reaches 127.0.0.1 only."""
    message = missing()
    if message:
        if os.environ.get("BFMOE_BROWSER_REQUIRED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=find_browser(), headless=True, args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        context.set_default_timeout(90_000)
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
    """Address and folder of a JupyterLab."""
    root, own = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    with run_lab(root, own) as address:
        yield address, root
