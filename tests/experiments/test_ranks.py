import numpy as np
import pandas as pd
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


def test_the_counting_index_has_a_line_a_batch_and_names_the_layers():
    steps = pd.DataFrame(
        [(name, kind, batch, batch * 1000 - 2000 * step) for batch in (1, 16)
         for step, (name, kind) in enumerate([("0", "convolution"), ("2", "convolution"), ("5", "linear")])],
        columns=["name", "kind", "batch", "ra_index"],
    )  # fmt: skip
    (axis,) = rendered(experiment.plot_ra_along_depth(steps))
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["conv1", "conv2", "fc"]
    assert {"1 image", "16 images"} <= {text.get_text() for text in axis.texts} and axis.get_yscale() == "symlog"
    np.testing.assert_allclose(axis.lines[1].get_ydata(), [16000, 14000, 12000])


def test_laws_are_drawn_where_there_are_any():
    sample = pd.DataFrame(
        {"system": ["W", "W", "K"], "law": [4, None, 6], "counted": [5, 5, 9], "measured": [4, 5, 6]}
    ).astype({"law": "Int64"})
    first, second = rendered(experiment.plot_laws(sample))
    assert first.get_title() == "rank W, 1 layers" and second.get_title() == "rank K, 1 layers"
    assert [c.get_offsets().tolist() for c in second.collections] == [[[9, 6]], [[6, 6]]]


def test_the_width_family_has_both_thresholds():
    runs = pd.DataFrame({"width": [24, 22, 20, 16], "deficit": [0, 82, 280, 700], "ra_index": [-9, -5, -1, 48],
                         "psnr_db": [100, 10, 13, 10]})  # fmt: skip
    (axis,) = rendered(experiment.plot_width_family(runs, limit=60))
    limit, *edges = axis.lines
    assert limit.get_ydata()[0] == 60 and [line.get_xdata()[0] for line in edges] == [18, 23]
    assert [text.get_text().split(":")[0] for text in axis.texts] == ["success", "counting", "rank"]


def test_a_width_has_its_prediction_and_the_range_of_its_attacks():
    runs = pd.DataFrame({"width": [8, 8], "deficit": [0, 0], "ra_index": [-5, -5], "psnr_db": [90.4, -0.2],
                         "verdict": ["exact", "exact"]})  # fmt: skip
    (row,) = experiment.by_width(runs).to_dict("records")
    assert row == {"width": 8, "deficit": 0, "ra_index": -5, "attacks": 2, "psnr_min": 0.0, "psnr_max": 90.0,
                   "verdict": "exact"}  # fmt: skip
    assert str(row["psnr_min"]) == "0.0"


def test_the_surplus_by_counting_stands_beside_the_ranks():
    table = experiment.count_and_rank(rgap.rank_analysis(small_cnn(), (3, 8, 8)).to_frame(counted=True))
    assert table["layer"].tolist() == ["conv1", "conv2", "fc"] and (table["rank"] <= table["unknowns"]).all()
