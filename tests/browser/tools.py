"""Gets what the browser tests need, within a bounded time, and says what it did.

    python -m tests.browser.tools             # fails when no browser can be had
    python -m tests.browser.tools --optional  # what CI does: the tests are skipped with the reason

JupyterLab and playwright come from pip. A Chromium of the system is taken as it is; else root on
Debian installs Debian's package; else playwright downloads its own. A browser counts once it has
shown a page. What was tried is kept in the environment, where the tests read it.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.browser.lab import FLAGS, REPORT, Report, playwrights_own, systems

ROOT = Path(__file__).parents[2]
SECONDS = {"pip": 300, "apt": 240, "download": 180, "start": 60}
"""At most, for each step. Measured: 25 s, 20 s, -, 1 s."""
APT = "-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15"


def attempt(name: str, command: list[str], seconds: float) -> str:
    """Run a command; "" when it went well, else why not, in one line."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"{name}: {error}"
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started: a download, dpkg
        process.wait()
        return f"{name}: not done after {seconds:.0f} s"
    return "" if process.returncode == 0 else f"{name}: {reason(output)}"


def reason(output: str) -> str:
    """The line of an output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    telling = [line for line in lines if line.startswith(("E:", "ERROR", "Error", "error"))]
    return (telling or lines[-1:])[0][:200]


def install_packages() -> str:
    """JupyterLab and playwright, in the versions of constraints.txt."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    trouble = attempt(
        "pip install jupyterlab playwright",
        [*command, "-c", "constraints.txt", "jupyterlab", "anywidget", "playwright"],
        SECONDS["pip"],
    )
    importlib.invalidate_caches()
    return trouble


def install_debians() -> str:
    """Debian's chromium, with a font."""
    release = Path("/etc/os-release")
    debian = release.is_file() and "ID=debian" in release.read_text().splitlines()
    if not debian or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "Debian's chromium: needs Debian and root"
    started = time.monotonic()
    attempt("apt-get update", ["apt-get", *APT.split(), "update"], SECONDS["apt"] / 2)
    return attempt(
        "apt-get install chromium",
        ["apt-get", *APT.split(), "install", "-y", "--no-install-recommends",
         "chromium", "fonts-dejavu-core"],
        SECONDS["apt"] - (time.monotonic() - started),
    )  # fmt: skip


def download_playwrights() -> str:
    """The browser that playwright's makers built; as root, also the libraries that it needs."""
    if os.geteuid() == 0 and shutil.which("apt-get"):  # in vain where all of them are there
        attempt("libraries", [sys.executable, "-m", "playwright", "install-deps", "chromium"], 120)
    return attempt(
        "playwright install chromium",
        [sys.executable, "-m", "playwright", "install", "chromium"],
        SECONDS["download"],
    )


def start(path: str) -> str:
    """Show one page in a browser; "" when that went well, else why not."""
    from playwright.sync_api import Error, sync_playwright

    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=path, args=FLAGS, timeout=1000 * SECONDS["start"]
            )
            shown = browser.new_page().evaluate("6 * 7")
            browser.close()
    except Error as error:
        return f"{path} does not start: {reason(error.message)}"
    return "" if shown == 42 else f"{path} computes 6 * 7 = {shown}"


def get_browser(report: Report) -> None:
    """Go through the sources until a browser starts; fills in the report."""
    given = os.environ.get("BFMOE_BROWSER")
    sources: list[tuple[str, Callable[[], str], Callable[[], str | None]]] = [
        ("that of BFMOE_BROWSER", lambda: "", lambda: given),
        ("that of the system", lambda: "", systems),
        ("Debian's package, just installed", install_debians, systems),
        ("playwright's own", download_playwrights, playwrights_own),
    ]
    for words, install, find in sources[:1] if given else sources[1:]:
        trouble = install()
        path = None if trouble else find()
        if path in report["broken"]:
            continue
        if path is not None:
            trouble = start(path)
            if not trouble:
                report.update(browser=path, words=f"{words} ({path})")
                return
            report["broken"].append(path)
        if trouble:
            report["tried"].append(trouble)


def main() -> int:
    """Install, try, report; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optional", action="store_true", help="no browser is no error")
    args = parser.parse_args()
    started = time.monotonic()
    report: Report = {"browser": None, "words": "", "tried": [], "broken": []}
    trouble = install_packages()
    if trouble:
        report["tried"].append(trouble)
    else:
        get_browser(report)
    with contextlib.suppress(OSError):  # an environment of somebody else's: said here only
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
    seconds = time.monotonic() - started
    if report["browser"] is not None:
        print(f"browser: {report['words']}, driven by playwright; {seconds:.0f} s")
        return 0
    print(f"browser: none can be had here, after {seconds:.0f} s; the browser tests will not run.")
    print("browser: tried " + "; ".join(report["tried"]))
    return 0 if args.optional else 1


if __name__ == "__main__":
    sys.exit(main())
