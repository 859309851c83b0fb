"""Every notebook runs from top to bottom in quick mode, its own assertions included."""

import pytest

from notebooks.build import build, sources

ALL = sources()


@pytest.mark.slow
@pytest.mark.parametrize("source", ALL, ids=[path.stem for path in ALL])
def test_runs(source, tmp_path):
    out = tmp_path / f"{source.stem}.ipynb"
    build(source, out, quick=True, timeout=240)
    assert out.stat().st_size > 0
