"""Sliders replace one picture, and the first one stays in the saved notebook."""

import matplotlib.pyplot as plt
import pytest
from IPython.display import Image

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
