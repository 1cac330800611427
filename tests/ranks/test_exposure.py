import dataclasses

import pytest
import torch
from torch import nn

import rgap
from rgap import models
from rgap.ranks.exposure import available_virtual_constraints, exposure
from rgap.results import LayerRank, RankAnalysis


def judged(model, shape, batch=1):
    return exposure(rgap.rank_analysis(model, shape, batch, limit=0))


def statuses(found):
    return [step.status for step in found.steps]


def test_a_network_whose_layers_all_have_full_rank_leaks():
    found = judged(models.cnn6(), (3, 32, 32))
    assert found.outcome == "leaks" and set(statuses(found)) == {"determined"}
    assert found.sentence == "leaks: every one of 7 steps gives its input away"


def test_what_the_layer_before_can_add_still_leaks_and_what_it_cannot_stops():
    closable = judged(models.cnn6(width=15), (3, 32, 32))
    second = closable.steps[1]
    assert (second.deficit, second.supply, second.status) == (858, 396 + 576, "closable")
    assert closable.outcome == "leaks"
    assert "with virtual constraints: '2' lacks 858 of 3468 equations, which the step before adds (972 at most)" in (
        closable.sentence
    )
    open_ = judged(models.cnn6(width=14), (3, 32, 32))
    assert open_.outcome == "stops" and open_.steps[1].status == "open"
    assert open_.sentence == (
        "stops: '2' lacks 1018 of 3468 equations, and the step before adds (972 at most); missing: 1.3 %, so few "
        "that a prior on images may make up for them"
    )
    assert open_.missing_share == pytest.approx(46 / 3468)
    narrow = judged(models.cnn6(width=8), (3, 32, 32))
    assert narrow.missing_share > 0.1 and narrow.sentence.endswith(f"missing: {100 * narrow.missing_share:.2g} %")


def test_the_supply_counts_the_range_of_the_weights_and_what_the_gradient_adds_to_it():
    """Against dense linear algebra: dim null(Wᵀ), and the intersection of the row spaces of W and K."""
    conv = nn.Conv2d(2, 8, 3, 1, 1, bias=False).double()
    analysis = rgap.rank_analysis(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(200, 3)).double(), (2, 5, 5))
    x = torch.rand(2, 5, 5, dtype=torch.float64)
    W = torch.func.jacrev(lambda x: conv(x[None]).flatten())(x).flatten(1)
    dz = torch.randn(1, 8, 5, 5, dtype=torch.float64)

    def gradient(x):
        return torch.nn.grad.conv2d_weight(x[None], conv.weight.shape, dz, padding=1).flatten()

    K = torch.func.jacrev(gradient)(x).flatten(1)
    rank = torch.linalg.matrix_rank
    left_null = len(W) - rank(W)
    intersection = rank(W) + rank(K) - rank(torch.cat([W, K]))
    assert available_virtual_constraints(analysis.layers[0]) == left_null + intersection
    assert available_virtual_constraints(None) == 0
    assert available_virtual_constraints(LayerRank("a", "convolution", 4, 4)) is None


def test_the_first_layer_gets_no_help():
    found = judged(models.cnn6(width=36), (3, 32, 32), batch=1)
    assert found.steps[0].supply == 0
    narrow = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1))
    assert judged(narrow, (3, 8, 8)).outcome == "stops"


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Softmax2d()], ids=["not invertible", "not analysed"])
def test_nothing_is_called_open_behind_what_may_add_equations_that_no_rank_counts(between):
    def network(middle):
        layers = [nn.Conv2d(3, 12, 4, 2, 2), middle, nn.Conv2d(12, 14, 3, 2, 1), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(14 * 81, 1))

    assert statuses(judged(network(nn.Tanh()), (3, 32, 32)))[1] == "open"
    unclear = judged(network(between), (3, 32, 32))
    assert statuses(unclear)[1] == "unknown" and unclear.outcome == "unknown"
    assert "what the step before adds is not known" in unclear.sentence


def test_through_relu_ranks_are_upper_bounds_and_nothing_is_shown():
    network = nn.Sequential(nn.Conv2d(1, 40, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1000, 5))
    found = judged(network, (1, 5, 5))
    assert found.outcome == "unknown" and set(statuses(found)) == {"determined"}
    assert found.sentence == "unknown: not every activation is invertible, so that ranks are upper bounds"


def test_pooling_and_residual_blocks_are_unknown_and_a_long_list_is_cut():
    analysis = rgap.rank_analysis(models.resnet18(), (3, 32, 32), limit=0)
    found = exposure(dataclasses.replace(analysis, entry=""))  # from the head down
    assert found.outcome == "unknown" and exposure(analysis).outcome == "leaks"
    assert found.sentence.startswith("unknown: 'avgpool' lacks 7680 of 8192 equations, and what the step before")
    assert found.sentence.endswith("; and 1 more")
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 1))
    step = judged(pooled, (3, 8, 8)).steps[1]
    assert step.status == "unknown" and "how to get 512 at most from the step before is not known" in step.sentence


def test_an_operation_that_is_not_analysed_keeps_a_network_from_being_judged():
    softmax = nn.Sequential(nn.Conv2d(1, 40, 3, 1, 1), nn.Flatten(), nn.Linear(1000, 5), nn.Softmax(1))
    found = judged(softmax, (1, 5, 5))
    assert found.outcome == "unknown" and found.not_analysed == ("3",)
    assert found.sentence == "unknown: '3' is not analysed"
    none = exposure(RankAnalysis((), 1, None, None, (), ""))
    assert none.outcome == "unknown" and "no step stands alone" in none.sentence


def test_as_a_table_integers_stay_integers():
    frame = judged(models.resnet(), (3, 32, 32)).to_frame()
    assert frame["deficit"].dtype == frame["supply"].dtype == "Int64"
    assert frame.columns.tolist() == ["name", "kind", "unknowns", "deficit", "supply", "status"]


def test_a_step_without_a_rank_says_so():
    layer = LayerRank("a", "convolution", 9, 9, ra_index=0)
    analysis = RankAnalysis((dataclasses.replace(layer),), 1, 0, None, (), "")
    assert exposure(analysis).sentence == "unknown: 'a' has no known rank"
