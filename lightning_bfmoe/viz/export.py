"""The explorer as one HTML file, which needs no kernel and no network."""

import base64
import html
import json
from dataclasses import asdict
from pathlib import Path

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.viz.assets import page_script, script, style
from lightning_bfmoe.viz.explorer_data import ExplorerData
from lightning_bfmoe.viz.explorer_picture import Selection, default_selection

MAX_BYTES = 32 << 20

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --bfm-page-ink: #1f2328; --bfm-page-paper: #ffffff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --bfm-page-ink: #e6e6e6; --bfm-page-paper: #16191d; --bfm-page-line: #8a9099; }}
}}
body {{ margin: 0 auto; max-width: 1250px; padding: 12px; background: var(--bfm-page-paper);
  color: var(--bfm-page-ink); font-family: system-ui, sans-serif; }}
h1 {{ font-size: 18px; margin: 4px 8px; }}
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<div id="bfm-root"></div>
<noscript>This page draws with JavaScript, which is switched off.</noscript>
<script type="application/json" id="bfm-data">{data}</script>
<script type="module">
{script}
{boot}
</script>
</body>
</html>
"""


def export_explorer(
    data: ExplorerData,
    path: str | Path,
    at: Selection | None = None,
    *,
    title: str = "Orbits of the experts",
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the page: every record, layer and matrix of the data is in it.

    Args:
        data: See `ExplorerData.of`.
        path: The HTML file; its folder must exist.
        at: What it shows first; the last record when None.
        title: Its heading.
        max_bytes: Most bytes of angles, which take 4/3 of that in the file.

    Returns:
        The path.

    Raises:
        ConfigError: The recording is larger than `max_bytes`.
    """
    sizes = data.sizes()
    if sum(sizes) > max_bytes:
        raise ConfigError(
            f"the angles of an exported page take at most {max_bytes} bytes",
            got=sum(sizes),
            fix="Choose layers=, record fewer rotations or steps, or raise max_bytes.",
        )
    blocks = list(range(len(sizes)))
    state = {**asdict(at or default_selection(data)), "meta": data.meta(blocks)}
    content = {
        "state": state,
        "angles": base64.b64encode(b"".join(map(data.block, blocks))).decode(),
        "probes": base64.b64encode(data.probe_bytes()).decode(),
    }
    page = _PAGE.format(
        title=html.escape(title),
        style=style(),
        data=json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
        script=script().replace("</script", "<\\/script"),
        boot=page_script(),
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path
