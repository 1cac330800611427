import numpy as np
import pandas as pd
import pytest
from cases import rendered

import rgap
from rgap.experiments import batch_cnn as experiment
from rgap.models import cnn6_batch


@pytest.mark.slow
def test_no_batch_through_random_convolutions_has_a_false_certificate():
    table = experiment.sample_conv_batches(4, seed=1)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    assert table["beyond"].sum() == 2 and (table.loc[table["beyond"], "verdict"] != "exact").all()
    assert (table["verdict"] == "exact").any()


def test_limits_of_several_networks():
    table = experiment.batch_limits({"64": cnn6_batch(), "16": cnn6_batch(hidden=(16,))}, (3, 32, 32))
    assert table["network"].tolist() == ["64", "16"] and (table["largest_batch"] >= 4).all()
    limits = [rgap.largest_batch(cnn6_batch(hidden=(h,)), (3, 32, 32)).batch_size for h in (64, 16)]
    assert table["largest_batch"].tolist() == limits


def test_attacks_are_drawn_against_the_batch_with_a_line_a_precision_and_each_limit():
    rows = [
        (batch, dtype, 10.0 * batch + seed) for dtype in ("float64", "float32") for batch in (1, 2) for seed in (0, 2)
    ]
    runs = pd.DataFrame(rows, columns=["batch", "dtype", "psnr_db"])
    (axis,) = rendered(experiment.plot_against_batch(runs, "psnr_db", "PSNR, dB", {"predicted": 3}))
    np.testing.assert_allclose([line.get_ydata() for line in axis.lines[:2]], [[11, 21], [11, 21]])
    assert axis.lines[-1].get_xdata()[0] == 3.5 and {"predicted: 3", "float64", "float32"} == {
        text.get_text() for text in axis.texts
    }
