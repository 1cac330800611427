import dataclasses
import math

import pytest
from torch import nn

import rgap
from rgap import models
from rgap.ranks.analysis import copa_index, counting_index
from rgap.results import LayerRank

CNN6 = {
    "cnn6": [-972, -3732, -12060, -12060, -19816, -75724, -1997],
    "cnn6_d": [-972, -708, -8172, -13356, -21112, -77020, -3293],
    "fcn3": [-784216, -99316, -217],
}


def analyse(name, **options):
    return rgap.rank_analysis(getattr(models, name)(), models.ANALYSIS_SHAPES[name], **options)


def row(analysis, name):
    return next(layer for layer in analysis.layers if layer.name == name)


@pytest.mark.parametrize("name", CNN6)
def test_the_counting_index_is_what_is_counted_by_hand(name):
    analysis = analyse(name, limit=0)
    counted = [layer.ra_index for layer in analysis.layers if layer.ra_index is not None]
    assert counted == CNN6[name] and analysis.max_ra_index == max(counted)


def test_virtual_constraints_are_carried_on_and_only_rise():
    assert counting_index(3072, 3468, 576, 0) == (-972, 396)
    assert counting_index(3468, 1620, 2160, 396) == (-708, 396)
    assert counting_index(100, 20, 30, 7) == (43, 7)
    assert counting_index(100, 160, 0, 0) == (-60, 60)


def test_copas_index_weighs_by_the_distance_to_the_output():
    assert copa_index([10, 0, 4]) == -10 + 0 - 1
    assert copa_index([]) == 0 and copa_index([1, None]) is None
    assert analyse("cnn6_d", limit=0).copa_index == round(-280 * 5 / 6)


@pytest.mark.slow
def test_check_values_of_cnn6_and_cnn6_d_by_law_and_by_number():
    expected = {
        ("cnn6", "0"): (3072, 576, 3072, 0),
        ("cnn6", "2"): (2916, 2928, 3468, 0),
        ("cnn6_d", "2"): (1620, 1968, 3188, 280),
    }
    for name in ("cnn6", "cnn6_d"):
        analysis = analyse(name)
        for layer in analysis.layers:
            if layer.kind not in {"convolution", "linear"}:
                continue
            laws = (layer.law_weights, layer.law_gradients, layer.law_rank)
            assert laws == (layer.rank_weights, layer.rank_gradients, layer.rank)
            assert layer.condition >= 1
            if (name, layer.name) in expected:
                assert (*laws, layer.deficit) == expected[name, layer.name]
    second = row(analysis, "2")
    assert second.virtual_constraints == 396
    assert second.weight_rows + second.gradient_rows - second.unknowns == 312
    assert analysis.leaking == ("0", "4", "6", "8", "10", "13")
    assert analysis.verdict.startswith("leaks: every one of 7 steps") and "'2' lacks 280 of 3468" in analysis.verdict


@pytest.mark.parametrize(("batch", "shape"), [(1, (7,)), (3, (7,)), (2, (4, 7))])
def test_linear_layers_on_vectors_and_on_positions(batch, shape):
    analysis = rgap.rank_analysis(nn.Linear(7, 3), shape, batch)
    (layer,) = analysis.layers
    assert layer.kind == "linear" and layer.unknowns == batch * math.prod(shape)
    positions = batch * math.prod(shape[:-1])
    expected = (positions * 3, 7 * min(3, positions), 7 * positions - 4 * max(positions - 3, 0))
    assert (layer.rank_weights, layer.rank_gradients, layer.rank) == expected
    assert (layer.law_weights, layer.law_gradients, layer.law_rank) == expected


def test_a_batch_multiplies_unknowns_and_weight_constraints_not_gradient_constraints():
    one, four = (analyse("cnn6", batch_size=batch, limit=0) for batch in (1, 4))
    for a, b in zip(one.layers, four.layers, strict=True):
        assert (b.unknowns, b.weight_rows, b.gradient_rows) == (4 * a.unknowns, 4 * a.weight_rows, a.gradient_rows)
    assert row(four, "13").ra_index == 4 * 3200 - 3200 - 4 - sum_of_virtual(four, "13")
    assert row(four, "2").law_rank == 4 * 3468 and four.batch_size == 4


def sum_of_virtual(analysis, name):
    virtual = 0
    for layer in analysis.layers:
        if layer.name == name:
            return virtual
        if layer.ra_index is not None:
            virtual = counting_index(layer.unknowns, layer.weight_rows, layer.gradient_rows, virtual)[1]
    raise AssertionError(name)


def test_the_frame_has_integers_and_every_field():
    frame = analyse("fcn3").to_frame()
    assert list(frame.columns) == [f.name for f in dataclasses.fields(LayerRank)]
    assert frame["rank"].dtype == "Int64" and len(frame) == 6
    assert analyse("fcn3").to_frame(counted=True)["name"].tolist() == ["1", "3", "5"]


def test_a_chain_is_taken_in_place_of_the_model():
    chain = rgap.prepare(models.fcn3(), (1, 28, 28))
    assert rgap.rank_analysis(chain, (1, 28, 28)) == analyse("fcn3")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "shape", "options", "error", "message"),
    [
        (Branching(), (4,), {}, rgap.UnsupportedLayerError, "Branching decides on values of the image"),
        (nn.Sequential(nn.ReLU()), (4,), {}, rgap.UnsupportedLayerError, "Sequential has no parameters"),
        (nn.BatchNorm2d(3), (3, 4, 4), {}, rgap.UnsupportedLayerError, "no convolution and no linear layer"),
        (
            models.cnn6(),
            (1, 32, 32),
            {},
            ValueError,
            r"image_shape \(1, 32, 32\) does not fit the network at layer '0'",
        ),
        (models.cnn6(), (3, 30, 30), {}, ValueError, "does not fit the network at layer '13'"),
        (models.cnn6(), (3, 0, 32), {}, ValueError, r"image_shape is \(3, 0, 32\)"),
        (models.cnn6(), (3, 32, 32), {"batch_size": 0}, ValueError, "batch_size is 0"),
        ("resnet18", (3, 32, 32), {}, TypeError, "model is a str"),
    ],
)
def test_errors_say_what_was_given_and_what_is_needed(model, shape, options, error, message):
    with pytest.raises(error, match=message):
        rgap.rank_analysis(model, shape, **options)
