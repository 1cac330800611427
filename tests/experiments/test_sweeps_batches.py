import pandas as pd
import pytest
import torch
from cases import batch, fcn

import rgap
from rgap.experiments import sweeps
from rgap.experiments.sweeps import attack_batches, batch_outcome, sample_batches, width_table


def test_every_size_and_seed_has_a_row_that_says_how_well_it_went():
    images, labels = batch(9)
    table, results = attack_batches(lambda seed: fcn(seed=seed), images, labels, [1, 4], [0, 1], dtype="float64")
    assert table[["batch", "seed"]].to_numpy().tolist() == [[1, 0], [1, 1], [4, 0], [4, 1]]
    assert (table["found"] == table["batch"]).all() and (table["certified"] == table["batch"]).all()
    assert not table["false"].any() and table["mse"].max() < 1e-18 and (table["label_share"] == 1).all()
    assert table["cosine"].min() > sweeps.COSINE and [r.verdict for r in results] == table["verdict"].tolist()


def test_a_false_image_is_counted():
    images, labels = batch(4)
    network = fcn()
    result = rgap.reconstruct(network, rgap.client_gradients(network, images, labels), (1, 6, 6), batch_size=4)
    true = batch_outcome(result, images, labels)
    other = images.clone()
    other[2] = 1 - other[2]
    swapped = batch_outcome(result, other, labels)
    assert true["false"] == 0 and swapped["false"] == 1 and swapped["mse"] > 1e-3 > true["mse"]


def test_a_result_without_images_has_an_outcome():
    images, labels = batch(12)
    network = fcn((24, 12))
    result = rgap.reconstruct(network, rgap.client_gradients(network, images, labels), (1, 6, 6), batch_size=12)
    outcome = batch_outcome(result, images, labels)
    assert outcome["found"] == outcome["certified"] == 0 and pd.isna(outcome["psnr_db"])


def test_widths_have_a_row_each():
    images, labels = batch(4)
    table = width_table(lambda seed, widths: fcn((*widths[:1], 30), seed=seed), images, labels, [40, 80])
    assert table["width"].tolist() == [40, 80] and (table["found"] == 4).all()
    assert table["parameters"].tolist() == [36 * w + 30 * w + 30 for w in (40, 80)]
    assert table["megabytes"].is_monotonic_increasing


@pytest.mark.parametrize("seed", [0, 1])
def test_no_false_certificate_in_a_sample_of_batches(seed):
    table = sample_batches(15, seed)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    assert {"case", "verdict", "psnr_db", "ok", "why"} <= set(table) and {"exact", "rank-deficient"} <= set(
        table["verdict"]
    )
    assert torch.tensor(table[table["verdict"] == "exact"]["psnr_db"].to_numpy()).min() > 50
