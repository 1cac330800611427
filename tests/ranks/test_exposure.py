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


class Function(nn.Module):
    """A function of the features and of the modules that it runs."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def mixed(between, features, channels=48):
    """A convolution, something between, and a head."""
    return nn.Sequential(nn.Conv2d(3, channels, 4, 4), between, nn.Flatten(), nn.Linear(features, 10))


ZEROED = nn.BatchNorm2d(48)
nn.init.zeros_(ZEROED.weight)
UNANALYSED = {
    "lstm": (Function(lambda x, lstm: lstm(x.flatten(1, 2))[0], nn.LSTM(8, 8, batch_first=True)), 3072),
    "attention": (Function(lambda x, attend: attend(*[x.flatten(1, 2)] * 3)[0],
                           nn.MultiheadAttention(8, 2, batch_first=True)), 3072),
    "layer norm": (nn.LayerNorm([48, 8, 8]), 3072),
    "sort": (Function(lambda x: x.sort(1)[0]), 3072),
    "times zero": (Function(lambda x: x * 0), 3072),
    "half dropped": (Function(lambda x: x[:, :, ::2]), 1536),
    "transposed": (nn.ConvTranspose2d(48, 12, 2, 2), 3072),
    "shared weight": (Function(lambda x, conv: conv(torch.tanh(conv(x))), nn.Conv2d(48, 48, 3, padding=1)), 3072),
    "softmax": (nn.Softmax2d(), 3072),
    "norm times zero": (ZEROED, 3072),
    "relu": (nn.ReLU(), 3072),
}  # fmt: skip


@pytest.mark.parametrize("name", UNANALYSED)
def test_what_was_not_analysed_is_unknown_in_the_analysis_as_in_the_audit(name):
    between, features = UNANALYSED[name]
    analysis = rgap.rank_analysis(mixed(between, features), (3, 32, 32), limit=0)
    found = exposure(analysis)
    assert found.outcome == "unknown" and analysis.verdict == found.sentence
    assert analysis.verdict.startswith("unknown: ") and len(analysis.verdict) <= 200


def test_a_mean_over_channels_counts_what_it_loses():
    """4,096 unknowns and 64 equations."""
    analysis = rgap.rank_analysis(mixed(Function(lambda x: x.mean(1)), 64, channels=64), (3, 32, 32), limit=0)
    mean = next(layer for layer in analysis.layers if layer.kind == "pooling")
    assert (mean.unknowns, mean.weight_rows, mean.deficit) == (4096, 64, 4096 - 64)
    assert exposure(analysis).outcome != "leaks" and analysis.layers[-1].virtual_constraints == 0


def test_networks_whose_layers_are_known_leak_or_stop_in_one_sentence():
    for model in (models.cnn6(), models.cnn6(width=15), models.cnn6(width=8), models.lenet(), models.fcn3()):
        shape = models.IMAGE_SHAPES["fcn3" if isinstance(model[0], nn.Flatten) else "cnn6"]
        analysis = rgap.rank_analysis(model, shape, limit=0)
        assert analysis.verdict == exposure(analysis).sentence and len(analysis.verdict) <= 200
        assert analysis.verdict.partition(":")[0] == exposure(analysis).outcome in ("leaks", "stops")


def test_many_and_long_names_are_cut_to_the_length_of_a_sentence():
    modules = [(f"{'very' * 20}_{i}", nn.Softmax(1)) for i in range(9)]
    network = nn.Sequential(*(m for _, m in modules))
    for name, module in modules:
        network.add_module(name, module)
    network.append(nn.Linear(4, 4))
    verdict = rgap.rank_analysis(network, (4,)).verdict
    assert len(verdict) <= 200 and verdict.endswith("more") and verdict.startswith("unknown: ")
    alone = nn.Sequential()
    alone.add_module("x" * 300, nn.Softmax(1))
    alone.append(nn.Linear(4, 4))
    assert len(rgap.rank_analysis(alone, (4,)).verdict) == 200


def frozen(model, *places):
    for place in places:
        model[place].requires_grad_(False)
    return model


def test_a_frozen_layer_has_no_gradient_rows():
    """CNN6 with all but the head frozen: what W alone leaves open nobody else shares."""
    analysis = rgap.rank_analysis(frozen(models.cnn6(), 0, 2, 4, 6, 8, 10), (3, 32, 32), limit=0)
    rows = {layer.name: layer for layer in analysis.layers}
    assert {rows[name].gradient_rows for name in ("0", "2", "4", "6", "8", "10")} == {0}
    assert (rows["2"].deficit, rows["2"].law_gradients, rows["2"].law_rank) == (552, 0, 2916)
    small = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 4))
    first = rgap.rank_analysis(frozen(small, 0), (3, 8, 8)).layers[0]
    assert (first.rank, first.rank_weights, first.rank_gradients, first.deficit) == (128, 128, 0, 64)
    assert rows["8"].deficit == 2916 - 1600 and "no gradient of it is shared" in rows["8"].note
    assert rows["13"].gradient_rows == 3200 and analysis.verdict.startswith("stops: '8' lacks 1316 of 2916")


def test_one_frozen_layer_may_still_leak_and_a_frozen_head_is_where_nothing_begins():
    assert judged(frozen(models.cnn6(), 4), (3, 32, 32)).outcome == "leaks"
    found = judged(frozen(models.cnn6(classes=4000), 13), (3, 32, 32))
    assert found.outcome == "unknown" and "the last layer '13' shares no gradient" in found.sentence
    whole = models.cnn6().requires_grad_(False)
    assert judged(whole, (3, 32, 32)).outcome == "leaks"  # frozen for evaluation


def test_pixels_that_are_never_read_are_supplied_by_nobody():
    layers = [nn.Conv2d(3, 21, 2, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(21, 18, 1, 2), nn.Tanh(), nn.Flatten()]
    analysis = rgap.rank_analysis(nn.Sequential(*layers, nn.Linear(72, 3)), (3, 6, 7))
    assert "75% of its pixels are never read" in analysis.layers[2].note
    assert exposure(analysis).outcome == "unknown" and statuses(exposure(analysis))[1] == "unknown"


def test_batches_leak_where_fully_connected_layers_tell_them_apart():
    mlp = nn.Sequential(nn.Flatten(), *(
        module for pair in ((784, 256), (256, 128)) for module in (nn.Linear(*pair), nn.ReLU())
    ), nn.Linear(128, 10))  # fmt: skip
    outcomes = {}
    for batch in (2, 64, 100, 300):
        analysis = rgap.rank_analysis(mlp, (1, 28, 28), batch, limit=0)
        outcomes[batch] = exposure(analysis).outcome
    assert outcomes == {2: "leaks", 64: "leaks", 100: "unknown", 300: "stops"}
    assert set(statuses(judged(mlp, (1, 28, 28), 64))) == {"separated"}
    one = judged(models.cnn6(), (3, 32, 32), 8)
    assert one.outcome == "unknown" and "no batch is known to come apart" in one.sentence
    assert judged(models.cnn6_batch(), (3, 32, 32), 4).outcome == "leaks"
    assert "9 images are known to come apart" in judged(models.cnn6_batch(), (3, 32, 32), 12).sentence
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    assert judged(tanh, (1, 28, 28), 2).outcome == "unknown"
