import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cases import rand
from matplotlib.colors import to_hex

from rgap.experiments import plots


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def drawn(figure):
    """The figure's axes, once everything in it has been rendered."""
    figure.canvas.draw()
    return figure.axes


def runs(widths=(24, 22, 20, 18), deficits=(0, 82, 280, 486)):
    """PSNR 100 dB with virtual constraints up to a deficit of 280; plain only without a deficit."""
    rows = []
    for width, deficit in zip(widths, deficits, strict=True):
        for virtual in (False, True):
            exact = deficit == 0 or (virtual and deficit <= 280)
            verdict = "exact" if exact else "rank-deficient"
            for noise in (0, 3):
                psnr = (100 if exact else 10) + noise
                rows.append(
                    {"width": width, "deficit": deficit, "psnr_db": psnr, "verdict": verdict, "virtual": virtual}
                )
    return pd.DataFrame(rows)


def errors():
    return pd.DataFrame(
        [(layer, dtype, size * (1 + i)) for i in range(3) for layer, dtype, size in
         [("fc", "float32", 1e-7), ("conv", "float32", 1e-6), ("fc", "float64", 1e-16), ("conv", "float64", 1e-14)]],
        columns=["layer", "dtype", "error"],
    )  # fmt: skip


def test_a_gallery_has_a_labelled_row_for_each_entry_and_titles_above():
    rows = {"truth": rand(3, 3, 4, 4), "found": 3 * rand(2, 3, 4, 4) - 1}
    axes = np.array(drawn(plots.gallery(rows, ["a", "b", "c"], size=1.0))).reshape(2, 3)
    assert [row[0].get_ylabel() for row in axes] == ["truth", "found"]
    assert [axis.get_title() for axis in axes[0]] == ["a", "b", "c"]
    assert [[len(axis.images) for axis in row] for row in axes] == [[1, 1, 1], [1, 1, 0]]
    shown = axes[1, 0].images[0].get_array()
    assert shown.shape == (4, 4, 3) and shown.min() == 0 and shown.max() == 1
    np.testing.assert_array_equal(axes[0, 1].images[0].get_array(), rows["truth"][1].permute(1, 2, 0))
    assert all(len(axis.get_xticks()) == len(axis.get_yticks()) == 0 for axis in axes.flat)


def test_a_gallery_of_one_channel_is_grey_and_keeps_its_scale():
    image = torch.full((1, 1, 4, 4), 0.25, requires_grad=True)
    (axis,) = drawn(plots.gallery({"": image}))
    assert axis.images[0].get_array().shape == (4, 4) and axis.images[0].get_clim() == (0, 1)
    assert axis.images[0].get_cmap().name == "gray" and axis.get_title() == ""


@pytest.mark.parametrize("rows", [{}, {"two channels": rand(1, 2, 4, 4)}, {"no channels": rand(4, 4)}])
def test_what_is_no_image_is_refused(rows):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        plots.gallery(rows)


def test_errors_grow_from_the_head_to_the_image():
    (axis,) = drawn(plots.error_growth(errors(), ["conv", "fc"]))
    assert "layer" in axis.get_xlabel() and "relative error" in axis.get_ylabel() and axis.get_yscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["conv", "fc"]
    legend = axis.get_legend()
    assert legend.get_title().get_text() == "gradients"
    assert [text.get_text() for text in legend.get_texts()] == ["float32", "float64"]
    low, high = axis.get_ylim()
    assert low == pytest.approx(1e-16) and high == pytest.approx(9e-6)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [2e-6, 2e-7])  # medians


def test_a_table_without_its_columns_is_refused():
    with pytest.raises((KeyError, ValueError)):
        plots.error_growth(errors().drop(columns="error"), ["fc", "conv"])
    with pytest.raises((KeyError, ValueError)):
        plots.phase_transition(runs().drop(columns="deficit"), {})
    with pytest.raises((KeyError, ValueError)):
        plots.wrong_signs(pd.DataFrame({"image": [0], "step": [1]}))


def test_an_image_is_stretched_to_the_range_of_pixels():
    stretched = plots.rescale(5 - 10 * rand(3, 4, 4))
    assert stretched.min() == 0 and stretched.max() == 1
    image = rand(3, 4, 4)
    torch.testing.assert_close(plots.rescale(7 * image + 2), plots.rescale(image))
    assert not plots.rescale(torch.full((1, 2, 2), 3.0)).any()


def test_the_phase_transition_shows_medians_certificates_and_thresholds():
    (axis,) = drawn(plots.phase_transition(runs(), {"supplied": 396, "never": 9999}))
    assert axis.get_xlabel() == "channels of the second layer" and axis.get_ylabel() == "PSNR (dB)"
    assert axis.xaxis_inverted()
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["plain R-GAP", "with virtual constraints", "not certified"]
    plain, virtual, *edges = axis.lines
    np.testing.assert_allclose(plain.get_ydata(), [11.5, 11.5, 11.5, 101.5])
    np.testing.assert_allclose(virtual.get_ydata(), [11.5, 101.5, 101.5, 101.5])
    assert [edge.get_xdata()[0] for edge in edges] == [23, 19]
    assert [text.get_text() for text in axis.texts] == ["no deficit\n(deficit ≤ 0)", "supplied\n(deficit ≤ 396)"]
    filled = [len(c.get_offsets()) for c in axis.collections if to_hex(c.get_facecolor()[0]) != "#ffffff"]
    assert filled == [2, 6]


def test_where_everything_is_determined_no_threshold_is_drawn():
    (axis,) = drawn(plots.phase_transition(runs((30, 26), (0, 0)), {"supplied": 396}))
    assert len(axis.lines) == 2 and not axis.texts


def test_wrong_signs_have_a_line_for_each_image():
    history = pd.DataFrame(
        {"image": [0, 0, 0, 7, 7], "step": [1, 2, 3, 1, 2], "wrong": [400, 20, 0, 300, 0], "layer": "2"}
    )
    (axis,) = drawn(plots.wrong_signs(history))
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("step", "wrong signs", "symlog")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0", "7"]
    assert axis.get_xticks().tolist() == [1, 2, 3] and axis.get_ylim()[0] == pytest.approx(-0.3)
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [400, 20, 0])


def test_more_images_than_markers():
    history = pd.DataFrame(
        [(i, step, 10 // step) for i in range(9) for step in (1, 2)], columns=["image", "step", "wrong"]
    )
    assert len(drawn(plots.wrong_signs(history))[0].get_legend().get_texts()) == 9


def test_the_counting_index_has_a_panel_a_batch_and_a_line_a_network():
    steps = pd.DataFrame(
        [(name, batch, step, batch * 1000 - 2000 * step) for name in "ab" for batch in (1, 16) for step in range(3)],
        columns=["network", "batch", "step", "ra_index"],
    )
    figure = plots.ra_along_depth(steps)
    one, sixteen = drawn(figure)
    assert (one.get_title(), sixteen.get_title()) == ("1 image", "16 images") and one.get_yscale() == "symlog"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    np.testing.assert_allclose(sixteen.lines[0].get_ydata(), [16000, 14000, 12000])


def test_laws_are_drawn_where_there_are_any():
    sample = pd.DataFrame(
        {"system": ["W", "W", "K"], "law": [4, None, 6], "counted": [5, 5, 9], "measured": [4, 5, 6]}
    ).astype({"law": "Int64"})
    first, second = drawn(plots.law_against_number(sample))
    assert first.get_title() == "rank W, 1 layers" and second.get_title() == "rank K, 1 layers"
    assert [c.get_offsets().tolist() for c in second.collections] == [[[9, 6]], [[6, 6]]]


def test_the_width_family_has_both_thresholds_and_names_the_widths():
    (axis,) = drawn(plots.deficit_against_psnr(runs(), limit=60, counted=486))
    places = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert places == [pytest.approx(82**0.5), pytest.approx(0.93 * 486)]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [60]
    assert {"22", "20", "18", "24 to 24"} <= {text.get_text() for text in axis.texts}


def test_batches_have_their_shares_their_seconds_and_the_limit():
    table = pd.DataFrame({"batch": [1, 8, 8], "seed": [0, 0, 1], "found": [1, 8, 6], "false": [0, 0, 2],
                          "certified": [1, 8, 4], "seconds": [0.1, 0.5, 0.7]})  # fmt: skip
    (axis,) = drawn(plots.found_against_batch(table, limit=9))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "found",
        "certified as exact",
        "false images",
    ]
    np.testing.assert_allclose([line.get_ydata() for line in axis.lines[:3]], [[1, 0.75], [1, 0.75], [0, 0.125]])
    assert axis.texts[0].get_text() == "second layer's width, 9"
    (axis,) = drawn(plots.seconds_against_batch(table, limit=9))
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.1, 0.6])
    assert axis.get_ylabel() == "seconds" and len(axis.collections[0].get_offsets()) == 3


def test_an_audits_bars_are_shares_of_the_unknowns_with_the_numbers_beside_them():
    rows = [("conv", "convolution", 200, 0, 0, "determined"), ("narrow", "convolution", 100, 40, 30, "open")]
    rows += [("2.0", "convolution", 100, 40, 90, "closable"), ("block", "residual block", 100, None, None, "unknown")]
    steps = pd.DataFrame(rows, columns=["name", "kind", "unknowns", "deficit", "supply", "status"])
    steps = steps.astype({"deficit": "Int64", "supply": "Int64"})
    (axis,) = drawn(plots.audit_steps(steps))
    widths = np.array([bar.get_width() for bar in axis.patches]).reshape(4, 3)
    np.testing.assert_allclose(widths, [[100, 100, 0], [100, 60, 30], [100, 60, 40], [100, 0, 0]])
    assert [text.get_text().replace("\n", " ") for text in axis.get_yticklabels()][1] == "narrow convolution"
    assert [text.get_text() for text in axis.texts] == [
        "200 unknowns: gives its input away",
        "100 unknowns, 40 missing: stays open",
        "100 unknowns, 40 missing: gives its input away with the step before",
        "100 unknowns: whether it leaks is not known",
    ]
    assert [text.get_text() for text in axis.get_legend().get_texts()][-1] == "not known"


def test_quality_against_time_has_a_line_an_image_and_a_marker_a_method():
    rows = [
        ("cnn6", 0, image, method, 0, step, 0.1 * step, 10.0 * step)
        for image in (0, 1)
        for method, steps in (("R-GAP", [1]), ("DLG", [1, 2, 3]))
        for step in steps
    ]
    names = ["network", "seed", "image", "method", "restart", "step", "seconds", "psnr_db"]
    figure = plots.quality_against_time(pd.DataFrame(rows, columns=names), ["R-GAP", "DLG"])
    (axis,) = drawn(figure)
    assert axis.get_xscale() == "log" and axis.get_ylabel() == "PSNR (dB)" and len(axis.lines) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["R-GAP", "DLG"]


def test_cost_has_a_panel_a_network_and_names_the_exponents():
    rows = [("n", "side", v, m, k * v) for v in (1, 2) for m, k in (("a", 1.0), ("b", 5.0))]
    table = pd.DataFrame(rows, columns=["network", "against", "value", "method", "seconds"])
    slopes = pd.DataFrame({"network": "n", "against": "side", "method": ["a", "b"], "exponent": [1.0, 1.0]})
    (axis,) = drawn(plots.cost_against_size(table, slopes))
    assert axis.get_xscale() == axis.get_yscale() == "log" and "pixels" in axis.get_xlabel()
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["a (exponent 1.0)", "b (exponent 1.0)"]


def test_a_row_may_hold_images_of_several_shapes():
    axes = drawn(plots.gallery({"both": [rand(3, 4, 4), rand(1, 6, 6)]}))
    assert [axis.images[0].get_array().shape for axis in axes] == [(4, 4, 3), (6, 6)]
