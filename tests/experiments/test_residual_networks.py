"""Notebook 13's attacks on small networks, and its sample."""

import pandas as pd
import pytest
import torch
from torch import nn

import rgap.experiments.residual_networks as experiment
from rgap.experiments.common import MIN_CERTIFIED_PSNR_DB
from rgap.models import resnet


@pytest.fixture
def image():
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3])


def test_networks_that_are_refused_stand_in_the_table(image):
    networks = {"blind": resnet(widths=(16, 48), kaiming=True), "GELU": resnet(widths=(16, 48), activation=nn.GELU)}
    table = experiment.attack_networks(networks, *image, "float64")
    assert table["verdict"].tolist() == ["exact", "refused"] and table["psnr_db"][0] > 150
    assert "not monotone" in table["entered"][1] and table["known_per_pixel"].isna()[1]


def test_a_network_with_max_pooling_gives_its_image():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    table, results = experiment.attack_images(experiment.vgg(0, (64, 128), (2, 2)), image, torch.tensor([3]), "float64")
    assert table["verdict"].tolist() == ["exact"] and table["psnr_db"][0] > 150
    assert "max pooling discards the positions" in " ".join(results[0].notes)


def test_shapes_are_solved_or_not_certified():
    table = experiment.solve_shapes([(20, 20, 4), (5, 5, 4)])
    assert table["certified"].tolist() == [True, True, False, False]
    assert (table["error"][:2] < 1e-5).all() and table["taps"].tolist()[2:] == ["none", "none"]


def test_noise_is_declared(image):
    table = experiment.attack_noisy(resnet(widths=(16, 48), kaiming=True), *image, [1e-9, 1e-2])
    assert table["verdict"][1] != "exact" and table["noise"].tolist() == [1e-9, 1e-2]


@pytest.mark.slow
def test_no_false_certificate_in_a_sample_of_networks():
    table = experiment.sample_residual(6, seed=8)
    assert table["ok"].all() and (table["verdict"] == "exact").any()


def test_the_sample_sees_a_false_certificate(monkeypatch):
    monkeypatch.setattr(experiment, "MIN_CERTIFIED_PSNR_DB", 1e9)
    row = pd.Series(experiment._attack_random_network(9))
    assert row["verdict"] == "exact" and not row["ok"] and MIN_CERTIFIED_PSNR_DB < row["psnr_db"]


def test_the_optimiser_gets_what_we_do_not_need(image):
    found, seconds = experiment.optimise(resnet(widths=(8, 8)), *image, steps=2)
    assert len(found) == 1 and found[0].images.shape == image[0].shape and seconds > 0
