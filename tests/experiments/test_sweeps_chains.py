import pytest
import torch
from cases import rand, randn, sequential
from torch import nn

import rgap
from rgap.client import client_gradients
from rgap.equations import solve_layer
from rgap.experiments.sweeps import chains, kind_table, random_chain, sample_chains
from rgap.experiments.sweeps.chains import dense_ranks

SAMPLE = sample_chains(30, seed=0, unknowns=400)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_thirty_random_chains_are_recovered_or_short_of_rank_and_none_is_certified_wrongly():
    assert len(SAMPLE) == 30 and SAMPLE["ok"].all()
    assert (SAMPLE["psnr_db"] >= chains.RECOVERED_DB).sum() >= 12
    assert (SAMPLE["verdict"] == "rank-deficient").sum() >= 5
    short = SAMPLE[SAMPLE["psnr_db"] < chains.RECOVERED_DB]
    assert (short["verdict"] != "exact").all() and short["why"].str.contains("lacks").all()


def test_the_table_counts_every_kind():
    table = kind_table(SAMPLE).set_index("kind")
    assert {"Conv2d", "Linear", "bias", "stride"} <= set(table.index)
    assert (table[["recovered", "short_of_rank", "wrong"]].sum(axis=1) == table["chains"]).all()
    assert table.loc["Flatten", "chains"] == 30 and table["wrong"].sum() == 0


def test_a_chain_follows_from_its_seed():
    first, again = (random_chain(5, 400) for _ in range(2))
    assert first[1:] == again[1:] and str(first[0]) == str(again[0])
    assert all(a.equal(b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True))


def test_dense_ranks_are_those_of_the_solver():
    network = sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 1)
    )
    chain, image, label = rgap.prepare(network, (3, 8, 8)), rand(1, 3, 8, 8), torch.tensor([1])
    ranks = dense_ranks(chain, image, label)
    result = rgap.reconstruct(chain, client_gradients(network, image, label), virtual_constraints=False)
    reports = {report.name: (report.unknowns, report.rank) for report in result.layers}
    assert {name: reports[name] for name in ranks} == ranks and ranks["0"][1] < 192


def test_a_false_certificate_is_not_in_order(monkeypatch):
    """As if the attack had returned another image and been sure of it."""
    number = int(SAMPLE.index[(SAMPLE["verdict"] == "exact")][0])
    honest = chains.reconstruct

    def wrong(*arguments, **options):
        result = honest(*arguments, **options)
        images = torch.rand_like(result.images)
        candidate = type(result.candidates[0])(images, result.labels, 0.0, True)
        return type(result)(images, result.labels, "exact", (candidate,), result.layers)

    monkeypatch.setattr(chains, "reconstruct", wrong)
    row = sample_chains(1, seed=number, unknowns=400).iloc[0]
    assert not row["ok"] and row["verdict"] == "exact"


def test_a_gradient_of_zero_is_in_order_where_the_head_has_none(monkeypatch):
    def dead(number, unknowns):
        network = sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
        network[1].bias.data.fill_(-100)
        return network, (1, 2, 2), "logistic", ["Linear"]

    monkeypatch.setattr(chains, "random_chain", dead)
    row = sample_chains(1).iloc[0]
    assert row["ok"] and row["verdict"] == "no gradient" and "zero" in row["why"]


def test_a_weight_system_that_only_repeats_the_gradients_adds_no_rank():
    """Pooling of z over all windows leaves W in the span of K: rounding must not pass for rank."""
    network = sequential(nn.Conv1d(1, 3, 3, 2), nn.AvgPool1d(3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1))
    layer = rgap.prepare(network, (1, 21)).layers[0]
    x, dz = randn(*layer.input_shape), randn(*layer.output_shape)
    weight = layer.weight.clone().requires_grad_()
    z = layer.after.apply(nn.functional.conv2d(x[None], weight, layer.bias, layer.stride))[0]
    (G,) = torch.autograd.grad((z * dz).sum(), weight)
    report = solve_layer(layer, G, dz[None], z.detach()[None], rcond=1e-5).report
    assert report.rank == 17 and report.deficit == 4
