import numpy as np
import pandas as pd
import pytest
import torch
from cases import batch, fcn, rendered

from rgap.experiments import batch_fcn as experiment


def test_widths_have_a_row_each():
    images, labels = batch(4)
    table = experiment.width_table(lambda seed, widths: fcn((*widths[:1], 30), seed=seed), images, labels, [40, 80])
    assert table["width"].tolist() == [40, 80] and (table["found"] == 4).all()
    assert table["parameters"].tolist() == [36 * w + 30 * w + 30 for w in (40, 80)]
    assert table["megabytes"].is_monotonic_increasing


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_false_certificate_in_a_sample_of_batches(seed):
    table = experiment.sample_batches(15, seed)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    assert {"case", "verdict", "psnr_db", "ok", "why"} <= set(table) and {"exact", "rank-deficient"} <= set(
        table["verdict"]
    )
    assert torch.tensor(table[table["verdict"] == "exact"]["psnr_db"].to_numpy()).min() > 50


def test_batches_have_their_seconds_and_the_limit():
    table = pd.DataFrame({"batch": [1, 8, 8], "seed": [0, 0, 1], "seconds": [0.1, 0.5, 0.7]})
    (axis,) = rendered(experiment.plot_seconds(table, limit=9))
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.1, 0.6])
    assert axis.get_ylabel() == "seconds" and axis.texts[0].get_text() == "second layer's width, 9"
