import dataclasses

import pytest
import torch

import rgap
from rgap.results import VERDICTS, LayerReport, Reconstruction, reports_frame


def result(*layers):
    return Reconstruction(torch.zeros(1, 1, 2, 2), torch.tensor([1]), "exact", (), layers)


def test_the_frame_has_a_row_a_layer_and_a_column_a_field():
    frame = result(LayerReport("2", 10, rank=10, deficit=0), LayerReport("0", 48, rank=40, deficit=8)).to_frame()
    assert list(frame.columns) == [f.name for f in dataclasses.fields(LayerReport)]
    assert frame.name.tolist() == ["2", "0"]
    assert frame.unknowns.tolist() == [10, 48] and frame.deficit.tolist() == [0, 8]
    assert frame.rank_weights.isna().all()


def test_the_frame_of_no_layers_still_has_its_columns():
    frame = reports_frame((), LayerReport)
    assert len(frame) == 0 and "sigma_above_cut" in frame.columns


@pytest.mark.parametrize(
    "record", [LayerReport("0", 1), result(), rgap.Candidate(torch.zeros(1), torch.tensor([0]), 0.0, True)]
)
def test_records_are_frozen(record):
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.layers = ()


def test_errors_are_value_errors_and_verdicts_go_from_worst_to_best():
    assert issubclass(rgap.UnsupportedLayerError, ValueError)
    assert issubclass(rgap.GradientMismatchError, ValueError)
    assert VERDICTS == ("rank-deficient", "inconsistent", "ambiguous", "exact")
