import pandas as pd
import pytest
import torch
from cases import rendered

import rgap
from rgap.experiments import vision_transformers as experiment

SHAPE = (3, 8, 8)


@pytest.fixture
def images():
    return rgap.data.load_images("embedded", image_shape=SHAPE, index=[0, 1])


def small(width=40, **options):
    return experiment.small_transformer(width, 2, size=8, patch=2, **options)


@pytest.mark.slow
def test_no_random_transformer_has_a_false_certificate():
    table = experiment.sample_transformers(12, seed=2)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    assert (table["verdict"] == "exact").any()
    assert not (table.loc[table["trouble"].isin(["weights", "two images"]), "verdict"] == "exact").any()


def test_every_image_is_attacked_alone(images):
    table, results = experiment.attack_images(small(), *images)
    assert table["verdict"].tolist() == ["exact", "exact"] and table["label_found"].all()
    assert (table["psnr_db"] > 75).all() and (table["deficit"] == 0).all()
    assert (table["psnr_db"] - table["predicted_psnr_db"]).abs().max() < 6
    assert experiment.worst_prediction(table) < 2
    assert [result.labels.tolist() for result in results] == [[0], [1]]


def test_a_head_of_zeros_is_named(images):
    with pytest.raises(rgap.UnsupportedLayerError, match=r"heads.head.weight.*zero"):
        experiment.attack_images(small(head=False), *images)


def test_widths_are_attacked_in_both_precisions(images):
    runs = experiment.attack_widths([4, 12], images[0][:1], images[1][:1], virtual_constraints=False)
    assert runs["dtype"].tolist() == ["float32", "float64"] * 2 and (runs["tokens"] == 4).all()
    assert (runs["verdict"] == "exact").tolist() == [False, False, True, True]
    (axis,) = rendered(experiment.plot_widths(runs))
    assert axis.get_xlabel() == "width of the tokens"


def test_defences_compare_three_estimates(images):
    noise = {"noise": lambda g, seed: rgap.client.gaussian_noise(g, 3e-3 * g[0].square().mean().sqrt().item(), seed)}
    table, pairs = experiment.attack_defended(small(), *images, noise | {"none": lambda g, seed: g})
    assert table["certified"].tolist() == [0.0, 1.0]
    assert table["smoothest image"][0] > table["least squares"][0]
    assert [len(pair) for pair in pairs.values()] == [2, 2] and pairs["noise"][0].shape == SHAPE


def test_updates_give_the_image_and_only_one_step_is_certified(images):
    table = experiment.attack_updates(small().double(), images[0][:1], images[1][:1], [1, 3])
    assert table["steps"].tolist() == [1, 3, 3] and (table["psnr_db"] > 120).all()
    assert table["verdict"].tolist() == ["exact", "inconsistent", "inconsistent"]


def test_predicted_errors_are_drawn_against_the_true_ones():
    rows = [("float32", 90.0, 91.0), ("float64", 260.0, 255.0)]
    (axis,) = rendered(experiment.plot_predicted(pd.DataFrame(rows, columns=["dtype", "psnr_db", "predicted_psnr_db"])))
    assert axis.lines[-1].get_xdata().tolist() == [90, 260]


def test_errors_are_magnified_around_grey():
    found = torch.full(SHAPE, 0.50001, dtype=torch.float64)
    assert torch.allclose(experiment.magnified_error(found, torch.full(SHAPE, 0.5)), torch.tensor(0.6).double())


@pytest.mark.slow
def test_vit_b_16_gives_a_photograph_back():
    image, label = rgap.data.load_images("embedded", image_shape=(3, 224, 224), index=[0])
    table, _ = experiment.attack_images(experiment.vit_b_16(), image, label)
    assert table["verdict"].tolist() == ["exact"] and table["psnr_db"].min() > 80
    assert experiment.peak_memory_gb() < 16
