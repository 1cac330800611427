import math

import numpy as np
import pandas as pd
import pytest
import torch
from cases import drawn, rand, rendered, small_cnn
from hypothesis import given
from hypothesis import strategies as st

import rgap
from rgap.experiments import twins as experiment
from rgap.head.logistic import C_MINIMUM, MU_AT_MINIMUM

IMAGES = rand(6, 3, 8, 8)
LARGE = 2.7  # weights with which margins of small_cnn lie on either side of the minimum
NETWORK = experiment.enlarged(small_cnn(), LARGE)
LABELS = (NETWORK(IMAGES)[:, 0] > 0).long()
LABELS[0] = 1 - LABELS[0]  # one that is misclassified


def test_the_curve_falls_to_the_smallest_c_and_rises_from_there():
    curve = experiment.margin_curve()
    for branch, sign in (("falling", -1), ("rising", 1)):
        part = curve[curve["branch"] == branch]
        assert (sign * np.diff(part["c"]) > 0).all() and MU_AT_MINIMUM in part["mu"].tolist()
    assert curve["c"].min() == pytest.approx(C_MINIMUM, abs=1e-15)


def test_enlarged_copies_and_scales_the_output_by_a_power():
    model = small_cnn()
    large = experiment.enlarged(model, 2.0)
    torch.testing.assert_close(large(IMAGES), 2.0**3 * model(IMAGES))
    assert model.state_dict().keys() == large.state_dict().keys()


def test_margins_of_the_truth_are_the_networks_and_twins_share_c():
    frame = experiment.true_margins(NETWORK.float(), IMAGES, LABELS)
    NETWORK.double()
    y = 2 * LABELS - 1
    np.testing.assert_allclose(frame["mu"], (y * NETWORK(IMAGES)[:, 0]).detach(), rtol=1e-5)
    assert frame["mu"][0] < 0 and math.isnan(frame["twin_mu"][0]) and not frame["twin_in_range"][0]
    for row, image in list(zip(frame.itertuples(), IMAGES, strict=True))[1:]:
        assert row.mu / (1 + math.exp(row.mu)) == pytest.approx(row.twin_mu / (1 + math.exp(row.twin_mu)), rel=1e-9)
        assert (row.mu - MU_AT_MINIMUM) * (row.twin_mu - MU_AT_MINIMUM) < 0
        assert row.twin_in_range == ((row.twin_mu / row.mu * image).max().item() <= 1)


@drawn
@given(st.floats(1e-9, 600))
def test_the_twin_of_the_twin_is_the_image(mu):
    network = small_cnn()
    image = IMAGES[:1] * mu / abs(network(IMAGES[:1]).item())
    label = (network(image)[:, 0] > 0).long()
    found = experiment.true_margins(network, image, label).loc[0]
    back = experiment.true_margins(network, image * found["twin_mu"] / found["mu"], label).loc[0]
    assert found["mu"] == pytest.approx(mu) and back["twin_mu"] == pytest.approx(mu, rel=1e-4)


def test_the_census_counts_over_all_networks_of_a_kind():
    census = experiment.twin_census(
        {"one": [NETWORK], "two": [NETWORK, small_cnn(1)], "tiny": [experiment.enlarged(NETWORK, 0.1)]}, IMAGES, LABELS
    )
    assert census["weights"].tolist() == ["one", "two", "tiny"] and census["samples"].tolist() == [6, 12, 6]
    first = experiment.true_margins(NETWORK, IMAGES, LABELS)
    assert census.loc[0, ["correct", "ambiguous"]].tolist() == [5, first["twin_in_range"].sum()]
    assert census.loc[0, "share"] == first["twin_in_range"].sum() / 5
    assert census.loc[2, "share"] == 0 and 0 < census.loc[2, "median_mu"] < census.loc[0, "median_mu"]


def test_pairs_have_both_candidates_and_a_verdict_that_knows_when_the_range_cannot_choose():
    table, results = experiment.twin_pairs(lambda seed: NETWORK, IMAGES, LABELS, [0], max_attacks=4)
    assert len(table) == len(results) == 4 and table["image"].tolist() == [1, 2, 3, 4]
    assert (table["candidates"] == 2).all() and (table["truth_error"] < 1e-9).all()
    assert (table["gradient_difference"] < 1e-12).all() and (table["mu"] > 0).all()
    assert ((table["verdict"] == "ambiguous") == table["twin_in_range"]).all()
    assert table["twin_in_range"].nunique() == 2
    for row, result in zip(table.itertuples(), results, strict=True):
        assert row.psnr_db == rgap.metrics.psnr_db(result.images, IMAGES[row.image : row.image + 1]).item()


def test_dlg_is_run_on_the_surest_images_and_measured_against_image_and_twin():
    networks = {"one": experiment.enlarged(NETWORK, 0.8), "two": NETWORK}
    table, found = experiment.dlg_on_twins(networks, IMAGES, LABELS, max_images=2, steps=3)
    assert table["weights"].tolist() == ["one", "one", "two", "two"] and found.shape == (4, 3, 8, 8)
    truth = experiment.true_margins(NETWORK, IMAGES, LABELS)
    assert table["mu"].tolist()[2:] == truth["mu"].nlargest(2).tolist()
    for row, image in zip(table.itertuples(), found, strict=True):
        twin = row.twin_mu / row.mu * IMAGES[row.image]
        assert row.from_image == pytest.approx(((image - IMAGES[row.image]).norm() / IMAGES[row.image].norm()).item())
        assert row.from_twin == pytest.approx(((image - twin).norm() / twin.norm()).item())


def test_a_vivid_pair_is_an_image_and_its_twin_with_one_gradient():
    pair, labels = experiment.vivid_pair(NETWORK, IMAGES)
    truth = experiment.true_margins(NETWORK, pair, labels)
    assert (truth["mu"] > 0).all() and truth["mu"].tolist() == pytest.approx(truth["twin_mu"].tolist()[::-1])


def test_an_image_beyond_the_pixel_range_is_told_and_not_shown():
    dark, bright = rand(1, 4, 4), 3 + rand(1, 4, 4)
    shown, told = experiment.shown_in_range(torch.stack([dark, bright]))
    assert shown.equal(dark) and "pixel range" in told


def test_without_a_correctly_classified_sample_there_is_no_pair():
    table, results = experiment.twin_pairs(lambda seed: NETWORK, IMAGES[:1], LABELS[:1], [0], max_attacks=4)
    assert table.empty and "verdict" in table and results == []


def test_the_figure_of_the_branches_joins_each_pair_at_one_height():
    figure = experiment.plot_branches(experiment.margin_curve(), [(0.2, 3.7), (0.5, 2.6)])
    (axis,) = rendered(figure)
    first, second, lowest, *pairs = axis.lines
    assert first.get_linestyle() != second.get_linestyle() and lowest.get_xdata()[0] == MU_AT_MINIMUM
    assert [list(line.get_xdata()) for line in pairs[:2]] == [[0.2, 3.7], [0.5, 2.6]]
    assert all(len(set(line.get_ydata())) == 1 for line in pairs)
    assert [text.get_text() for text in axis.texts][-1] == "an image and its twin"


def test_the_figure_of_the_census_has_a_line_a_network():
    rows = [{"network": n, "factor": f, "share": f / 5} for n in ("CNN6", "FCN3") for f in (1, 2, 4)]
    (axis,) = rendered(experiment.plot_census(pd.DataFrame(rows)))
    assert [text.get_text() for text in axis.texts] == ["CNN6", "FCN3"] and axis.get_ylim()[1] >= 0.8
