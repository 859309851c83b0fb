"""Sphinx: the documentation site, built without a network (`make docs`).

Notebooks are shown as they were executed and committed; the reference is made from docstrings.
What is generated (`notebooks/`, `api/`, the live explorer) is written before reading begins and
not committed.
"""

import base64
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import jupyter_server_mathjax

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(DOCS))

from lightning_bfmoe import __version__  # noqa: E402

project = "lightning-bfmoe"
author = "The lightning-bfmoe authors"
copyright = author  # noqa: A001 (Sphinx's name)
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "images", "recordings"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
html_theme = "furo"
html_title = f"lightning-bfmoe {__version__}"
html_static_path = ["_static", str(Path(jupyter_server_mathjax.__file__).parent / "static")]
# MathJax 2.7 from a Python package: formulas without a CDN
mathjax_path = "MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"
mathjax2_config = {
    "tex2jax": {"inlineMath": [["\\(", "\\)"]], "processClass": "math", "ignoreClass": ".*"},
    "messageStyle": "none",
    "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web"},  # the fonts that lie beside it
}
nb_render_markdown_format = "myst"

default_role = "literal"  # our docstrings put names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # a hook is in the reference when it says something of its own
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style")]
# ref.python: words before a colon in "Returns" are read as a type, so a name like d_out in a shape
# looks like a reference to one of several attributes
suppress_warnings = ["toc.empty_glob", "myst.header", "ref.python"]

DOOR = "lightning_bfmoe"
ROOMS = {
    DOOR: "Everything that a program usually imports.",
    "lightning_bfmoe.callbacks": "The Lightning side: what a Trainer is given.",
    "lightning_bfmoe.strategy": "Several processes and machines.",
    "lightning_bfmoe.swap": "Into a model: finding and exchanging feed-forward blocks.",
    "lightning_bfmoe.calibrate": "Fitting ternary layers to what a model sees.",
    "lightning_bfmoe.deploy": "Out to a file, and from the file to text.",
    "lightning_bfmoe.plan": "When the weights become ternary, and what holds when.",
    "lightning_bfmoe.layers": "The modules.",
    "lightning_bfmoe.functional": "The mathematics, as pure functions of tensors.",
    "lightning_bfmoe.kernels": "The same functions, faster.",
    "lightning_bfmoe.metrics": "Measures as torchmetrics.",
    "lightning_bfmoe.viz": "Pictures and widgets.",
    "lightning_bfmoe.data": "Text that needs no network.",
    "lightning_bfmoe.errors": "What goes wrong, and what to do then.",
}


def write(path: Path, text: str) -> None:
    """Write a generated page, but only when it changed: then Sphinx does not read it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def copy_notebooks() -> None:
    """Committed notebooks into the site; links out of their folder become links of the site."""
    target = DOCS / "notebooks"
    kept = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    for stale in target.glob("*.ipynb"):
        if stale.name not in kept:
            stale.unlink()
    for name in sorted(kept):
        text = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
        text = text.replace("](../docs/", "](../")
        # text in place of the badge, which is an image from outside
        text = re.sub(r"\[!\[Open in Colab\]\([^)]*\)\]", "[Open in Colab]", text)
        text = re.sub(
            r"\[`?([^\]`]+)`?\]\(\.\./(?:examples|benchmarks|lightning_bfmoe)/[^)]*\)",
            r"`\1`",
            text,
        )
        write(target / name, text)


def copy_pictures() -> None:
    """What the widgets of the notebooks left as pictures, for the gallery."""
    folder = DOCS / "_static" / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        widgets = [c for c in cells if "widget" in c["metadata"].get("tags", [])]
        for number, cell in enumerate(widgets):
            shown = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o["data"]]
            data = base64.b64decode("".join(shown[0]))
            (folder / f"{path.stem[:2]}-{number}.png").write_bytes(data)


def directives(room: str, name: str) -> list[str]:
    """What documents one public name."""
    value = getattr(importlib.import_module(room), name)
    if isinstance(value, type):
        return [f".. autoclass:: {name}", "   :members:", "   :show-inheritance:", ""]
    if callable(value):
        return [f".. autofunction:: {name}", ""]
    return [f".. py:data:: {name}", ""]


def public_names(module: ModuleType) -> list[str]:
    """What a room offers: its `__all__`, or else the classes that it defines."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return sorted(getattr(module, "__all__", [n for n in own if isinstance(vars(module)[n], type)]))


def write_reference() -> None:
    """One page a room with its public names; the door's page says where each of its names is."""
    homes: dict[int, str] = {}
    public = {room: public_names(importlib.import_module(room)) for room in ROOMS}
    for room in ROOMS:
        if room != DOOR:
            for name in public[room]:
                homes.setdefault(id(getattr(importlib.import_module(room), name)), room)
    for room, purpose in ROOMS.items():
        module = importlib.import_module(room)
        page = [f"# {room}", "", purpose, ""]
        own = public[room]
        if room == DOOR:
            values = {name: id(getattr(module, name)) for name in own}
            page += ["| name | room |", "|---|---|"]
            page += [
                f"| `{name}` | [`{homes[value]}`]({homes[value]}.md) |"
                for name, value in values.items()
                if value in homes
            ]
            page += ["", "And here:", ""]
            own = [name for name, value in values.items() if value not in homes]
        page += ["```{eval-rst}"]
        page += [f".. currentmodule:: {room}", ""]
        for name in own:
            page += directives(room, name)
        write(DOCS / "api" / f"{room}.md", "\n".join([*page, "```", ""]))
    rows = [f"| [`{room}`]({room}.md) | {purpose} |" for room, purpose in ROOMS.items()]
    toc = ["```{toctree}", ":hidden:", "", *ROOMS, "```", ""]
    head = ["# Reference", "", "From the docstrings.", "", "| room | what is in it |", "|---|---|"]
    write(DOCS / "api" / "index.md", "\n".join([*head, *rows, "", *toc]))


def export_explorer() -> None:
    """The live orbit explorer of the gallery, from a recording that is committed."""
    from lightning_bfmoe import OrbitExplorer

    page = DOCS / "_static" / "orbits.html"
    recording = DOCS / "recordings" / "orbits.safetensors"
    page.parent.mkdir(exist_ok=True)
    shutil.rmtree(page, ignore_errors=True)
    page.unlink(missing_ok=True)
    OrbitExplorer(recording).export_html(page)


def escape_bars(app, what, name, obj, options, lines) -> None:
    """A norm like |x| in a docstring's prose is no substitution of reStructuredText."""
    in_math = False
    for number, line in enumerate(lines):
        if line.strip():
            deeper = line.startswith((" ", "\t"))
            in_math = line.lstrip().startswith(".. math") or (in_math and deeper)
        if not in_math and "`" not in line and ">>>" not in line:
            lines[number] = line.replace("|", "\\|")


def setup(app) -> None:
    """Called by Sphinx."""
    copy_notebooks()
    copy_pictures()
    write_reference()
    export_explorer()
    app.connect("autodoc-process-docstring", escape_bars)
