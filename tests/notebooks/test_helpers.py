"""Sliders replace one picture, which stays in the saved notebook; the text is the one asked for."""

import matplotlib.pyplot as plt
import pytest
from IPython.display import Image

from lightning_bfmoe.data import hub
from notebooks import helpers


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, picture):
        self.shown.append(picture)


@pytest.fixture
def displayed(monkeypatch):
    """What `display` was given, and the handle of the picture."""
    given, handle = [], Handle()

    def display(thing, display_id=None):
        given.append(thing)
        return handle if display_id else None

    monkeypatch.setattr(helpers, "display", display)
    return given, handle


def test_a_slider_draws_again_and_replaces_the_picture(displayed):
    given, handle = displayed
    drawn = []

    def draw(degrees, stage):
        drawn.append((degrees, stage))
        figure, axes = plt.subplots(figsize=(1, 1))
        axes.plot([0, degrees])
        return figure

    helpers.slide(draw, degrees=(range(0, 90, 30), 30), stage=(["a", "b"], "b"))
    box, first = given
    assert isinstance(first, Image)
    assert drawn == [(30, "b")]
    degrees, stage = box.children
    assert (degrees.description, stage.value) == ("degrees", "b")
    degrees.value = 60
    stage.value = "a"
    assert drawn == [(30, "b"), (60, "b"), (60, "a")]
    assert [isinstance(picture, Image) for picture in handle.shown] == [True, True]
    assert handle.shown[0].data != first.data
    assert plt.get_fignums() == [], "figures are closed, so none is shown twice"


def test_a_start_that_is_no_choice_is_refused(displayed):
    with pytest.raises(Exception, match="Invalid selection"):
        helpers.slide(lambda n: plt.figure(), n=(range(3), 7))


def test_the_text_is_the_one_asked_for(monkeypatch, capsys):
    monkeypatch.delenv("BFMOE_CORPUS", raising=False)
    assert helpers.choose_corpus() == helpers.local_corpus()
    monkeypatch.setenv("BFMOE_CORPUS", "stdlib")
    assert helpers.choose_corpus() == "stdlib"
    assert capsys.readouterr().out == ""


def test_a_text_of_the_hub_is_fetched_or_replaced_aloud(monkeypatch, capsys, tmp_path):
    class Online:
        def load_dataset(self, *args, split, **options):
            return {"text": [f"{split} {index}\n" for index in range(50)]}

    class Offline:
        def load_dataset(self, *args, **options):
            raise ConnectionError("no route")

    monkeypatch.setenv("BFMOE_CORPUS", "wikitext2")
    monkeypatch.setattr(hub, "import_datasets", Online)
    assert helpers.choose_corpus() == "wikitext2" and capsys.readouterr().out == ""
    monkeypatch.setattr(hub, "import_datasets", Offline)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    local = tmp_path / "local.txt"
    local.write_text("one line\n" * 50)
    monkeypatch.setattr(helpers, "local_corpus", lambda: str(local))
    assert helpers.choose_corpus() == str(local)
    said = "wikitext2 cannot be had from the Hugging Face Hub (ConnectionError); reading"
    assert capsys.readouterr().out == f"{said} {local} instead\n"
