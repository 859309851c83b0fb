"""What the README says holds: its Python runs, its links lead somewhere, its targets exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 200

BLOCK = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)\n```", flags=re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)[^)]*\)|<img[^>]*src=\"(?P<image>[^\"]+)\"")
# `docs/decisions.md`, `lightning_bfmoe/swap/`: a path in backticks that names a file or a folder.
NAMED = re.compile(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?|[\w-]+\.(?:md|txt|toml|py|yaml|cff))`")

# Made by a run, so named in the text before they are there.
MADE = ("outputs/", "lightning_logs/", "checkpoints/", ".venv/")


def blocks() -> list[tuple[str, bool]]:
    """The Python blocks of the README, each with whether it is meant to be run."""
    found = BLOCK.finditer("\n" + README)
    return [(block["code"], "<!-- no-run -->" not in block["before"]) for block in found]


def prose() -> str:
    """The README without its fenced blocks, where a word in brackets is code."""
    return re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)


def test_every_python_block_compiles():
    for number, (code, _) in enumerate(blocks(), start=1):
        compile(code, f"README.md, Python block {number}", "exec")


def test_every_python_block_runs(tmp_path):
    # A loop, not a parameter: a README without such a block is legal and must not read as a skip.
    for number, (code, run) in enumerate(blocks(), start=1):
        if run:
            done = subprocess.run(
                [sys.executable, "-W", "error:::lightning_bfmoe", "-c", code],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, f"block {number}:\n{code}\n{done.stderr[-3000:]}"


def test_every_link_leads_to_a_file():
    targets = [match["target"] or match["image"] for match in LINK.finditer(prose())]
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_every_named_file_exists():
    named = [name for name in NAMED.findall(prose()) if not name.startswith(MADE)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z][\w-]*)", README)) <= targets
    assert set(re.findall(r"^make ([a-z][\w-]*)", README, flags=re.MULTILINE)) <= targets


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see `docs/a.md`, `examples/`, `LICENSE.txt`", ["docs/a.md", "examples/", "LICENSE.txt"]),
        ("`top_k=2`, `a/b` and `pack(model, path)`", []),
    ],
)
def test_the_pattern_finds_file_names(text, names):
    assert NAMED.findall(text) == names
