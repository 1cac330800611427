"""Pairs of seed and image through larger networks: their rows and counts, on small ones."""

import pandas as pd
import pytest
import torch

import rgap.experiments.walked_networks as experiment
from rgap.models import resnet


@pytest.fixture
def small(monkeypatch):
    """Two networks of seconds in place of the large ones."""
    networks = {
        "small": lambda seed: resnet(seed, (16, 48), kaiming=True),
        "small, unknown scale": lambda seed: resnet(seed, (16, 48), kaiming=True),
    }
    monkeypatch.setattr(experiment, "NETWORKS", networks)
    original = experiment.load_images
    monkeypatch.setattr(experiment, "load_images", lambda source, n, shape, **o: original(source, n, (3, 8, 8), **o))
    return tuple(networks)


def test_pairs_come_back_exactly_and_are_counted(small):
    rows = experiment.sample_walks(4, names=small)
    assert (rows["verdict"] == "exact").all() and rows["ok"].all()
    assert rows["case"].tolist()[0] == "small, float32, 0" and rows["case"].nunique() == 4
    assert (rows.set_index("dtype")["psnr_db"]["float64"] > 150).all()


def test_a_certificate_above_the_truth_is_false(small, monkeypatch):
    monkeypatch.setattr(experiment, "psnr_db", lambda *_: torch.tensor(20.0))
    assert not experiment.sample_walks(1, names=small)["ok"].any()


def test_features_of_a_walk_that_ends_above_the_image():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    table = experiment.walk_features(resnet(0, (6, 48), kaiming=True), image, torch.tensor([3]))
    done = table["rank"] == 1
    assert done.any() and (table["relative_error"][done] < 1e-10).all()
    assert not done.iloc[-1] and pd.isna(table["relative_error"].iloc[-1])


@pytest.mark.parametrize("name", experiment.NETWORKS)
def test_every_network_takes_an_image(name):
    if not name.startswith(("ResNet-18", "VGG-16", "bottlenecks")):
        assert experiment.NETWORKS[name](0)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
