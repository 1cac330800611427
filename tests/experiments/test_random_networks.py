import pytest
import torch
from cases import sequential
from torch import nn

from rgap.experiments import random_networks as experiment


@pytest.fixture(scope="module")
def sample():
    return experiment.sample_chains(30, seed=0, max_unknowns=400)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_thirty_random_chains_are_recovered_or_short_of_rank_and_none_is_certified_wrongly(sample):
    assert len(sample) == 30 and sample["ok"].all()
    assert (sample["psnr_db"] >= experiment.RECOVERED_DB).sum() >= 12
    assert (sample["verdict"] == "rank-deficient").sum() >= 5
    short = sample[sample["psnr_db"] < experiment.RECOVERED_DB]
    assert (short["verdict"] != "exact").all() and short["why"].str.contains("lacks").all()


@pytest.mark.slow
def test_the_table_counts_every_kind(sample):
    table = experiment.kind_table(sample).set_index("kind")
    assert {"Conv2d", "Linear", "bias", "stride"} <= set(table.index)
    assert (table[["recovered", "short_of_rank", "wrong"]].sum(axis=1) == table["chains"]).all()
    assert table.loc["Flatten", "chains"] == 30 and table["wrong"].sum() == 0


def test_a_chain_follows_from_its_seed():
    first, again = (experiment.random_chain(5, 400) for _ in range(2))
    assert first[1:] == again[1:] and str(first[0]) == str(again[0])
    assert all(a.equal(b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True))


@pytest.mark.slow
def test_a_false_certificate_is_not_in_order(monkeypatch, sample):
    """As if the attack had returned another image and been sure of it."""
    number = int(sample.index[(sample["verdict"] == "exact")][0])
    honest = experiment.reconstruct

    def wrong(*arguments, **options):
        result = honest(*arguments, **options)
        images = torch.rand_like(result.images)
        candidate = type(result.candidates[0])(images, result.labels, 0.0, True)
        return type(result)(images, result.labels, "exact", (candidate,), result.layers)

    monkeypatch.setattr(experiment, "reconstruct", wrong)
    row = experiment.sample_chains(1, seed=number, max_unknowns=400).iloc[0]
    assert not row["ok"] and row["verdict"] == "exact"


def test_a_gradient_of_zero_is_in_order_where_the_head_has_none(monkeypatch):
    def dead(number, unknowns):
        network = sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
        network[1].bias.data.fill_(-100)
        return network, (1, 2, 2), "logistic", ["Linear"]

    monkeypatch.setattr(experiment, "random_chain", dead)
    row = experiment.sample_chains(1).iloc[0]
    assert row["ok"] and row["verdict"] == "no gradient" and "zero" in row["why"]
