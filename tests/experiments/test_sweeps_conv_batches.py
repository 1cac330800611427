import pytest

import rgap
from rgap.experiments import sweeps
from rgap.models import cnn6_batch


@pytest.mark.slow
def test_no_batch_through_random_convolutions_has_a_false_certificate():
    table = sweeps.sample_conv_batches(8, seed=1)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    assert table["beyond"].sum() == 4 and (table.loc[table["beyond"], "verdict"] != "exact").all()
    assert (table["verdict"] == "exact").any()


def test_limits_of_several_networks():
    table = sweeps.batch_limits({"64": cnn6_batch(), "16": cnn6_batch(hidden=(16,))}, (3, 32, 32))
    assert table["network"].tolist() == ["64", "16"] and (table["largest_batch"] >= 4).all()
    assert table["largest_batch"].tolist() == [rgap.largest_batch(cnn6_batch(hidden=(h,)), (3, 32, 32)).batch_size
                                               for h in (64, 16)]  # fmt: skip
