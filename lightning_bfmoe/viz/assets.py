"""The JavaScript and CSS that ship with the package, as plain files without a build step."""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./[\w.]+\";\n", flags=re.MULTILINE)
_EXPORT = re.compile(r"^export (?=const|function)", flags=re.MULTILINE)


@cache
def script() -> str:
    """The explorer as one ES module: a widget takes a single file, so the three are joined."""
    mathematics, drawing, explorer = (
        (FOLDER / f"orbit_{name}.js").read_text(encoding="utf-8")
        for name in ("math", "draw", "explorer")
    )
    return _EXPORT.sub("", mathematics) + _EXPORT.sub("", drawing) + _IMPORT.sub("", explorer)


@cache
def style() -> str:
    """The style sheet of all widgets."""
    return (FOLDER / "orbit_explorer.css").read_text(encoding="utf-8")


@cache
def page_script() -> str:
    """What a page without a kernel adds: a stand-in for the widget's model."""
    return (FOLDER / "page.js").read_text(encoding="utf-8")
