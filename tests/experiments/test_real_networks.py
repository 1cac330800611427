import pandas as pd
import pytest
import torch
from cases import rand, sequential
from torch import nn

import rgap
from rgap.client import client_gradients
from rgap.experiments import real_networks as experiment

IMAGE, LABEL = rand(1, 3, 8, 8), torch.tensor([2])


def network(seed=0, width=12, second=10, activation=nn.ReLU):
    convs = [nn.Conv2d(3, width, 3, 2, 1), activation(), nn.Conv2d(width, second, 3, 1, 1), nn.Tanh()]
    return sequential(*convs, nn.Flatten(), nn.Linear(16 * second, 4), seed=seed)


def test_failed_attacks_are_explained_by_rank():
    runs = experiment.attacked_and_ranked(lambda seed: network(seed, second=12 - 11 * seed), IMAGE, LABEL, [0, 1])
    assert runs["verdict"].tolist() == ["exact", "rank-deficient"]
    assert runs["missing"][0] == 0 < runs["missing"][1] and runs["label_found"].all()
    assert experiment.recovered_or_short(runs, 100) == 1
    assert experiment.recovered_or_short(runs.assign(missing=0), 100) == 0.5
    assert experiment.recovered_or_short(runs.assign(verdict="exact"), 100) == 0.5


def test_the_least_width_is_recovered_and_one_filter_less_is_not():
    table = experiment.least_widths(lambda seed, width: network(seed, width), IMAGE, LABEL, [0, 1], "cross_entropy")
    assert table["seed"].tolist() == [0, 1]
    assert (table["psnr_db"] > 60).all() and (table["below_db"] < 60).all()
    assert (table["below_verdict"] != "exact").all() and (table["active"] > 0).all()


@pytest.mark.parametrize("least", [20, 41, 42, 55])
def test_the_search_walks_from_the_bound_to_the_threshold(monkeypatch, least):
    """The bound is 42 where nothing is active: 74 · 42 ≥ 3,072."""
    tried = []

    def attack(make_model, *_):
        tried.append(make_model(0))
        recovered = tried[-1] >= least
        verdict = "exact" if recovered else "rank-deficient"
        return pd.DataFrame([{"psnr_db": 100.0 if recovered else 9.0, "verdict": verdict}]), []

    monkeypatch.setattr(experiment, "attack_each", attack)
    monkeypatch.setattr(experiment, "active_units", lambda *_: 0)
    found = experiment.least_width(lambda width: width, rand(1, 3, 32, 32), LABEL, "mse")
    assert found["bound"] == 42 and found["width"] == least and found["psnr_db"] == 100 and found["below_db"] == 9
    assert len(set(tried)) == len(tried)


def test_missing_ranks_are_those_of_the_solver():
    network = sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 1)
    )
    chain, image, label = rgap.prepare(network, (3, 8, 8)), rand(1, 3, 8, 8), torch.tensor([1])
    result = rgap.reconstruct(
        chain, client_gradients(network, image, label), virtual_constraints=False, gradient_scale=1.0
    )
    solved = {report.name: report.unknowns - report.rank for report in result.layers if report.name in ("0", "2")}
    missing = experiment.missing_ranks(chain, image, label)
    assert missing == {name: lack for name, lack in solved.items() if lack} and missing["0"] > 0
