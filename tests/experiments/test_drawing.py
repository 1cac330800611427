"""Lines with their names, points on a diagonal, galleries, titles."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cases import rand, rendered

from rgap.experiments import drawing


def test_layers_are_numbered_from_the_image_on_and_a_single_linear_one_is_not():
    kinds = {"0": "convolution", "2": "convolution", "pool": "average pooling", "13": "linear"}
    assert drawing.step_labels(kinds) == {"0": "conv1", "2": "conv2", "pool": "pool", "13": "fc"}
    assert list(drawing.step_labels({"a": "linear", "b": "linear"}).values()) == ["fc1", "fc2"]


def test_a_line_is_the_median_and_its_band_reaches_to_the_extremes():
    data = pd.DataFrame({"x": [1, 1, 1, 2], "y": [0.0, 1.0, 5.0, 3.0], "kind": "a"})
    _, axis = plt.subplots()
    drawing.lines(axis, data, "x", "y", by="kind")
    assert axis.lines[0].get_ydata().tolist() == [1, 3] and axis.lines[0].get_label() == "a"
    low, high = axis.collections[0].get_datalim(axis.transData).get_points()[:, 1]
    assert (low, high) == (0, 5)
    drawing.lines(axis, data, "x", "y", band=False)
    assert len(axis.lines) == 2 and len(axis.collections) == 1


@pytest.mark.parametrize("in_margin", [False, True])
def test_names_of_lines_that_end_together_stand_apart(in_margin):
    figure, axis = plt.subplots(figsize=(4, 3))
    names = ["line 0", "line 1", "of three\nlines\nof text", "line 3"]
    for number, name in enumerate(names):
        axis.plot([0, 1], [0, 1 + 1e-3 * number], label=name)
    drawing.name_lines(axis, in_margin)
    drawing.titled(drawing.finish(figure), "A title that makes the axes lower " * 3).canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert [text.get_text() for text in axis.texts] == names
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert [text.get_color() for text in axis.texts] == [line.get_color() for line in axis.lines]


def test_points_are_filled_where_they_are_certified():
    data = pd.DataFrame({"x": [1, 2, 3], "y": [1, 2, 3], "verdict": ["exact", "ambiguous", "exact"]})
    _, axis = plt.subplots()
    drawing.points(axis, data, "x", "y", "red")
    drawing.key_of_points(axis)
    filled, hollow, *_ = axis.collections
    assert filled.get_offsets().tolist() == [[1, 1], [3, 3]] and hollow.get_offsets().tolist() == [[2, 2]]
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["certified as exact", "not certified"]


def test_points_have_the_diagonal_and_factors():
    data = pd.DataFrame({"x": [1, 4], "y": [2, 3], "kind": ["a", "b"]})
    _, axis = plt.subplots()
    drawing.against_diagonal(axis, data, "x", "y", "kind", (1, 3))
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 4], [3, 12]]


def test_a_figure_says_what_it_shows_and_what_that_rests_on():
    figure, _ = plt.subplots(figsize=(4, 3))
    drawing.titled(drawing.finish(figure), "a finding " * 8, "24 images")
    figure.canvas.draw()
    assert "\n" in figure.get_suptitle() and figure.get_supxlabel() == "24 images"


def test_a_gallery_has_a_labelled_row_for_each_entry_and_titles_above():
    rows = {"truth": rand(3, 3, 4, 4), "found": 3 * rand(2, 3, 4, 4) - 1}
    axes = np.array(rendered(drawing.gallery(rows, ["a", "b", "c"], size=1.0))).reshape(2, 3)
    assert [row[0].get_ylabel() for row in axes] == ["truth", "found"]
    assert [axis.get_title() for axis in axes[0]] == ["a", "b", "c"]
    assert [[len(axis.images) for axis in row] for row in axes] == [[1, 1, 1], [1, 1, 0]]
    shown = axes[1, 0].images[0].get_array()
    assert shown.shape == (4, 4, 3) and shown.min() == 0 and shown.max() == 1
    np.testing.assert_array_equal(axes[0, 1].images[0].get_array(), rows["truth"][1].permute(1, 2, 0))
    assert all(len(axis.get_xticks()) == len(axis.get_yticks()) == 0 for axis in axes.flat)


def test_a_gallery_of_one_channel_is_grey_and_keeps_its_scale():
    image = torch.full((1, 1, 4, 4), 0.25, requires_grad=True)
    (axis,) = rendered(drawing.gallery({"": image}))
    assert axis.images[0].get_array().shape == (4, 4) and axis.images[0].get_clim() == (0, 1)
    assert axis.images[0].get_cmap().name == "gray" and axis.get_title() == ""


@pytest.mark.parametrize("rows", [{}, {"two channels": rand(1, 2, 4, 4)}, {"no channels": rand(4, 4)}])
def test_what_is_no_image_is_refused(rows):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        drawing.gallery(rows)


def test_a_row_may_hold_images_of_several_shapes():
    axes = rendered(drawing.gallery({"both": [rand(3, 4, 4), rand(1, 6, 6)]}))
    assert [axis.images[0].get_array().shape for axis in axes] == [(4, 4, 3), (6, 6)]


def test_a_text_stands_in_the_cell_of_an_image_that_cannot_be_shown_and_rows_have_captions():
    rows = {"a": [rand(3, 4, 4), rand(3, 4, 4)], "b": [rand(3, 4, 4), "outside"]}
    axes = rendered(drawing.gallery(rows, captions={"b": ["1 dB", "2 dB"]}))
    assert [axis.get_title() for axis in axes] == ["", "", "1 dB", "2 dB"]
    assert [text.get_text() for text in axes[3].texts] == ["outside"] and not axes[3].images
