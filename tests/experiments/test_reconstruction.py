import numpy as np
import pandas as pd
import pytest
import torch
from cases import rand, rendered, small_cnn

import rgap
from rgap.experiments import reconstruction as experiment

IMAGES, LABELS = rand(2, 3, 8, 8), torch.tensor([0, 1])


def test_layer_errors_are_relative_to_the_true_inputs():
    network = small_cnn(bias=True)
    chain = rgap.prepare(network, (3, 8, 8))
    result = rgap.reconstruct(chain, rgap.client_gradients(network.float(), IMAGES[:1], LABELS[:1]), gradient_scale=1.0)
    frame = experiment.layer_errors(chain, IMAGES[:1], result)
    assert frame.name.tolist() == ["5", "2", "0"] and set(result.to_frame().columns) < set(frame.columns)
    assert frame.error.between(1e-12, 1e-3).all()
    image = result.images - IMAGES[:1]
    assert frame.error.iloc[-1] == pytest.approx((image.norm() / IMAGES[:1].norm()).item())
    twice = experiment.layer_errors(chain, IMAGES[1:], result)
    assert twice.error.iloc[-1] == pytest.approx(((result.images - IMAGES[1:]).norm() / IMAGES[1:].norm()).item())


def test_every_victim_is_attacked_before_training_and_after_each_epoch():
    images, labels = rand(8, 3, 8, 8).float(), torch.arange(8) % 2
    victims = images[:2], labels[:2]
    runs = experiment.trained_attacks(small_cnn().float(), images, labels, *victims, epochs=2, batch_size=4)
    assert runs[["epoch", "image"]].to_numpy().tolist() == [[e, i] for e in range(3) for i in range(2)]
    assert runs["loss"].nunique() == 3 and (runs["psnr_best_db"] >= runs["psnr_db"]).all()
    assert (runs["psnr_best_db"] > 60).all() and runs["label_found"].all()
    assert (runs[["gradient_norm", "condition"]] > 0).all(axis=None) and (runs["twins"] >= 1).all()
    figure = experiment.plot_training(runs)
    (axis,) = rendered(figure)
    assert [text.get_text() for text in axis.texts] == ["image 0", "image 1"] and axis.get_xticks().tolist() == [
        0,
        1,
        2,
    ]


def errors():
    return pd.DataFrame(
        [(layer, dtype, size * (1 + i)) for i in range(3) for layer, dtype, size in
         [("fc", "float32", 1e-7), ("conv", "float32", 1e-6), ("fc", "float64", 1e-16), ("conv", "float64", 1e-14)]],
        columns=["layer", "dtype", "error"],
    )  # fmt: skip


def test_errors_grow_from_the_head_to_the_image():
    (axis,) = rendered(experiment.plot_error_growth(errors(), ["conv", "fc"]))
    assert "layer" in axis.get_xlabel() and "relative error" in axis.get_ylabel() and axis.get_yscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["conv", "fc"]
    assert [text.get_text() for text in axis.texts] == ["float32\ngradients", "float64\ngradients"]
    low, high = axis.get_ylim()
    assert low == pytest.approx(1e-16) and high == pytest.approx(9e-6)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [2e-6, 2e-7])  # medians


def test_layers_are_named_as_a_reader_calls_them():
    assert experiment.layer_names(rgap.prepare(small_cnn(), (3, 8, 8))) == {"0": "conv1", "2": "conv2", "5": "fc"}


def test_training_is_summed_up_by_epoch():
    rows = [(0, 1.234, 2.0, 3.0, 1, 100.0, "exact"), (0, 1.234, 4.0, 3.0, 1, 110.0, "ambiguous")]
    columns = ["epoch", "loss", "gradient_norm", "condition", "twins", "psnr_best_db", "verdict"]
    (row,) = experiment.by_epoch(pd.DataFrame(rows, columns=columns)).to_dict("records")
    assert row == {"epoch": 0, "loss": 1.2, "gradient_norm": 3.0, "condition": 3.0, "twins": 1.0,
                   "closer_psnr_db": 100.0, "ambiguous": 0.5}  # fmt: skip
