import pytest
import torch
from cases import rand
from torch import nn

import rgap
from rgap.experiments import small_networks
from rgap.experiments.small_networks import attack_small_networks, small_network


def test_small_networks_vary_and_are_made_by_their_number():
    drawn = [small_network(number, 16) for number in range(24)]
    assert len({description for _, description in drawn}) == 24
    ends = {type(network[-1]) for network, _ in drawn}
    assert ends == {nn.Linear, nn.LeakyReLU, nn.Tanh, nn.Sigmoid}
    again = small_network(5, 16)[0]
    assert all(torch.equal(p, q) for p, q in zip(drawn[5][0].parameters(), again.parameters(), strict=True))
    assert all(2 <= sum(isinstance(m, nn.Conv2d) for m in network) <= 4 for network, _ in drawn)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_each_is_recovered_or_told_short_of_rank():
    table = attack_small_networks(rand(2, 3, 12, 12), torch.tensor([3, 7]), 8)
    assert table["told"].all() and set(table["verdict"]) <= set(rgap.results.VERDICTS)
    assert (table["seconds"] < 20).all() and len(table) == 8


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_the_sample_says_what_is_not_told(monkeypatch):
    monkeypatch.setattr(small_networks, "SAMPLED_SIDE", 12)
    table = small_networks.sample_small(2, seed=3)
    assert table["ok"].all() and table["number"].tolist() == [1006, 1007] and (table["why"] == "").all()
    monkeypatch.setattr(small_networks, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(small_networks, "MAX_HOPELESS_SECONDS", 0.0)
    assert all("decided after" in why for why in small_networks.sample_small(1, seed=3)["why"])
