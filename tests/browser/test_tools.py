"""Getting a browser is bounded, ends with one that starts, and otherwise says what was tried."""

import json
import sys

import pytest

from tests.browser import lab, tools

PYTHON = [sys.executable, "-c"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with browsers made of paper: what the system, Debian and playwright have."""
    has = {"system": None, "debian": None, "playwright": None, "works": set()}

    def apt():
        has["system"] = has["debian"] or has["system"]
        return "" if has["debian"] else "apt-get install chromium: E: no mirror"

    def download():
        return "" if has["playwright"] else "playwright install chromium: Error: no route"

    report = tmp_path / "report.json"
    for module in (lab, tools):
        monkeypatch.setattr(module, "REPORT", report)
        monkeypatch.setattr(module, "systems", lambda: has["system"])
        monkeypatch.setattr(module, "playwrights_own", lambda: has["playwright"])
    monkeypatch.setattr(tools, "install_packages", lambda: "")
    monkeypatch.setattr(tools, "install_debians", apt)
    monkeypatch.setattr(tools, "download_playwrights", download)
    monkeypatch.setattr(
        tools, "start", lambda path: "" if path in has["works"] else f"{path} does not start: why"
    )
    monkeypatch.setattr(lab, "find_spec", lambda name: name)
    monkeypatch.delenv("BFMOE_BROWSER", raising=False)
    monkeypatch.setattr(sys, "argv", ["tools"])
    return has


@pytest.mark.parametrize(
    ("has", "words"),
    [
        ({"system": "/s", "works": {"/s"}}, "that of the system (/s)"),
        ({"debian": "/d", "works": {"/d"}}, "Debian's package, just installed (/d)"),
        ({"playwright": "/p", "works": {"/p"}}, "playwright's own (/p)"),
        ({"system": "/s", "playwright": "/p", "works": {"/p"}}, "playwright's own (/p)"),
    ],
)
def test_the_first_browser_that_starts_is_taken(machine, capsys, has, words):
    machine.update(has)
    assert tools.main() == 0
    assert f"browser: {words}, driven by playwright" in capsys.readouterr().out
    assert lab.missing() == "" and lab.find_browser() in has["works"]


def test_without_one_the_reason_is_said_here_and_by_the_tests(machine, capsys, monkeypatch):
    machine["system"] = "/s"  # there, but it does not start
    assert tools.main() == 1
    monkeypatch.setattr(sys, "argv", ["tools", "--optional"])
    assert tools.main() == 0
    said = capsys.readouterr().out
    for words in ("/s does not start: why", "E: no mirror", "Error: no route"):
        assert words in said and words in lab.missing()
    assert lab.find_browser() is None


def test_a_browser_that_was_named_is_the_only_one_tried(machine, monkeypatch):
    machine.update(system="/s", works={"/s"})
    monkeypatch.setenv("BFMOE_BROWSER", "/mine")
    assert tools.main() == 1
    assert json.loads(tools.REPORT.read_text())["tried"] == ["/mine does not start: why"]


def test_a_step_is_bounded_and_its_trouble_is_one_line():
    assert tools.attempt("a", [*PYTHON, "print('fine')"], 30) == ""
    assert tools.attempt("b", [*PYTHON, "import time; time.sleep(60)"], 0.2).startswith(
        "b: not done"
    )
    loud = "print('one'); print('E: no such package'); print('end'); raise SystemExit(3)"
    assert tools.attempt("c", [*PYTHON, loud], 30) == "c: E: no such package"
    assert tools.attempt("d", ["/no/such/program"], 30).startswith("d: [Errno 2]")


def test_packages_of_the_system_are_left_alone_without_root(monkeypatch):
    def refuse(*args):
        raise AssertionError("ran a command")

    monkeypatch.setattr(tools.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(tools, "attempt", refuse)
    assert tools.install_debians() == "Debian's chromium: needs Debian and root"
