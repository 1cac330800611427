import numpy as np
import pandas as pd
import pytest
import torch
from cases import rand, rendered, small_cnn

import rgap
from rgap.experiments import ranks as experiment

IMAGES, LABELS = rand(2, 3, 8, 8), torch.tensor([0, 1])


def test_the_rank_table_has_a_row_for_each_network_and_batch():
    networks = {"cnn6_d": (rgap.models.cnn6_d(), (3, 32, 32)), "fcn3": (rgap.models.fcn3(), (1, 28, 28))}
    table, steps = experiment.rank_table(networks, [1, 4])
    assert table["network"].tolist() == ["cnn6_d", "cnn6_d", "fcn3", "fcn3"] and table["batch"].tolist() == [1, 4, 1, 4]
    assert table.iloc[0][["steps", "max_ra_index", "by_count", "by_rank", "unknown", "deficit"]].tolist() == [
        *(7, -708, 0, 1, 0, 280)
    ]
    assert len(steps) == 20 and steps.query("network == 'fcn3' and batch == 1")["step"].tolist() == [0, 1, 2]


def test_laws_of_a_sample_are_the_measured_ranks_and_repeat():
    state = torch.get_rng_state()
    sample = experiment.rank_law_sample(40, seed=3, max_unknowns=120)
    assert torch.get_rng_state().equal(state)
    assert len(sample) == 120 and sample["law"].notna().mean() > 0.9
    known = sample.dropna(subset="law")
    assert known["law"].eq(known["measured"]).all() and (known["counted"] >= known["measured"]).all()
    pd.testing.assert_frame_equal(sample, experiment.rank_law_sample(40, seed=3, max_unknowns=120))


def test_predictions_stand_beside_what_was_measured():
    runs = experiment.predicted_and_measured({8: small_cnn}, IMAGES, LABELS, [0, 1], virtual_constraints=False)
    assert len(runs) == 4 and (runs["width"] == 8).all() and (runs["deficit"] == 0).all()
    assert (runs["ra_index"] < 0).all() and (runs["psnr_db"] > 60).all()


def test_the_counting_index_has_a_panel_a_batch_and_a_line_a_network():
    steps = pd.DataFrame(
        [(name, batch, step, batch * 1000 - 2000 * step) for name in "ab" for batch in (1, 16) for step in range(3)],
        columns=["network", "batch", "step", "ra_index"],
    )
    figure = experiment.plot_ra_along_depth(steps)
    one, sixteen = rendered(figure)
    assert (one.get_title(), sixteen.get_title()) == ("1 image", "16 images") and one.get_yscale() == "symlog"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    np.testing.assert_allclose(sixteen.lines[0].get_ydata(), [16000, 14000, 12000])


def test_laws_are_drawn_where_there_are_any():
    sample = pd.DataFrame(
        {"system": ["W", "W", "K"], "law": [4, None, 6], "counted": [5, 5, 9], "measured": [4, 5, 6]}
    ).astype({"law": "Int64"})
    first, second = rendered(experiment.plot_laws(sample))
    assert first.get_title() == "rank W, 1 layers" and second.get_title() == "rank K, 1 layers"
    assert [c.get_offsets().tolist() for c in second.collections] == [[[9, 6]], [[6, 6]]]


def test_the_width_family_has_both_thresholds_and_names_the_widths():
    runs = pd.DataFrame({"width": [24, 22, 20, 18], "deficit": [0, 82, 280, 486], "psnr_db": [100, 10, 13, 10]})
    (axis,) = rendered(experiment.plot_deficits(runs, limit=60, counted=486))
    places = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert places == [pytest.approx(82**0.5), pytest.approx(0.93 * 486)]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [60]
    assert {"22", "20", "18", "24 to 24"} <= {text.get_text() for text in axis.texts}
