import dataclasses
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from rgap.experiments import audited_networks as experiment
from rgap.ranks.exposure import exposure


@pytest.mark.slow
def test_a_few_random_networks_are_audited_as_attack_and_jacobian_allow():
    sample = pd.DataFrame([experiment._audit_one(number) for number in (0, 1, 2, 3, 5)])
    assert sample["ok"].all() and {"leaks", "stops"} <= set(sample["outcome"])
    assert set(sample["outcome"]) <= {"leaks", "stops", "unknown"} and (sample["why"].str.len() <= 200).all()
    leaks = sample[sample["outcome"] == "leaks"]
    assert len(leaks) and (leaks["jacobian_lacks"] == 0).all()


@pytest.mark.slow
def test_a_false_leak_is_not_in_order(monkeypatch):
    """As if a network whose pixels are partly never read were said to leak."""
    always = lambda analysis: dataclasses.replace(exposure(analysis), outcome="leaks")  # noqa: E731
    monkeypatch.setattr(experiment, "exposure", always)
    row = experiment.sample_audit(1, seed=26).iloc[0]
    assert row["jacobian_lacks"] > 0 and not row["ok"]


def test_a_network_follows_from_its_number_and_kinds_occur():
    first, again = (experiment.random_audited(5) for _ in range(2))
    assert first[1:] == again[1:] and str(first[0]) == str(again[0])
    assert all(a.equal(b) for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True))
    kinds = {kind for number in range(60) for kind in experiment.random_audited(number)[3]}
    assert kinds == {"pooling", "channel mean", "frozen"}


def test_the_jacobian_counts_what_the_shared_gradient_does_not_tell():
    """One linear layer shares δz xᵀ: every pixel of an image, the sum alone of a batch; nothing where it is frozen."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    images, labels = torch.rand(3, 1, 2, 4, dtype=torch.float64), torch.tensor([0, 1, 1])
    assert experiment.jacobian_lacks(model, images[:1], labels[:1], "logistic") == 0
    assert experiment.jacobian_lacks(model, images, labels, "logistic") > 8
    model[1].requires_grad_(False)
    assert experiment.jacobian_lacks(model, images[:1], labels[:1], "logistic") == 7


@pytest.mark.slow
def test_a_network_of_the_zoo_is_analysed_in_a_process_of_its_own(monkeypatch):
    row = experiment._analyse_one("squeezenet1_1")
    assert row["ok"] and row["verdict"] in ("leaks", "stops", "unknown") and row["why"].startswith(row["verdict"])
    assert 0 < row["seconds"] < 20 and 0 < row["gigabytes"] < 4
    large = json.dumps({"seconds": 1.0, "sentence": row["why"], "gigabytes": 5.0})
    answers = [SimpleNamespace(returncode=0, stdout=f"a warning\n{large}\n"),
               SimpleNamespace(returncode=1, stderr="Traceback\nAttributeError: no_such_network\n")]  # fmt: skip
    monkeypatch.setattr(experiment.subprocess, "run", lambda *_, **__: answers.pop(0))
    assert not experiment._analyse_one("squeezenet1_1")["ok"]
    failed = experiment._analyse_one("no_such_network")
    assert failed["verdict"] == "error" and not failed["ok"] and "no_such_network" in failed["why"]


def test_the_zoo_is_every_classification_network_in_chunks(monkeypatch):
    monkeypatch.setattr(experiment, "_analyse_one", lambda name: {"case": name})
    every = [name for chunk in range(4) for name in experiment.sample_zoo(25, chunk)["case"]]
    assert len(every) == len(set(every)) >= 80 and {"resnext101_64x4d", "mnasnet0_5", "vit_b_16"} <= set(every)
