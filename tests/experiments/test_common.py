"""Attacks on images and on batches."""

import pandas as pd
import pytest
import torch
from cases import batch, fcn, rand, small_cnn

import rgap
from rgap.experiments import common

IMAGES, LABELS = rand(2, 3, 8, 8), torch.tensor([0, 1])


def test_every_image_seed_and_dtype_has_a_row_and_a_result_in_the_same_order():
    table, results = common.attack_each(small_cnn, IMAGES, LABELS, [3, 4], ["float32", "float64"])
    runs = [(s, d, i) for s in (3, 4) for d in ("float32", "float64") for i in (0, 1)]
    assert list(table[["seed", "dtype", "image"]].itertuples(index=False, name=None)) == runs
    assert len(results) == 8 and (table.seconds > 0).all()
    assert table.verdict.tolist() == [r.verdict for r in results]
    for (_, row), result in zip(table.iterrows(), results, strict=True):
        truth = IMAGES[row.image : row.image + 1]
        assert row.psnr_db == pytest.approx(rgap.metrics.psnr_db(result.images, truth).item())
        assert row.mse == pytest.approx(rgap.metrics.mse(result.images, truth).item())
        assert row.ssim == pytest.approx(rgap.metrics.ssim(result.images, truth).item())
        assert row.gradient_residual == result.candidates[0].gradient_residual
        assert row.label_found == (result.labels[0] == LABELS[row.image])
    exact = table[table.verdict == "exact"]
    assert exact.label_found.all() and exact[exact.dtype == "float32"].psnr_db.min() > 80
    assert exact[exact.dtype == "float64"].psnr_db.min() > 160 and len(exact) > 0


def test_the_attack_gets_a_prepared_chain_the_options_and_no_label(monkeypatch):
    calls = []

    def spy(chain, gradients, **options):
        calls.append((chain, gradients[0].dtype, options))
        return rgap.reconstruct(chain, gradients, **options)

    monkeypatch.setattr(common, "reconstruct", spy)
    common.attack_each(small_cnn, IMAGES, LABELS, [0], rcond=1e-6)
    expected = {"loss": "logistic", "gradient_scale": 1.0, "effort": "full", "rcond": 1e-6}
    assert [(dtype, options) for _, dtype, options in calls] == [(torch.float32, expected)] * 2
    assert isinstance(calls[0][0], rgap.Chain) and calls[0][0] is calls[1][0]


def test_the_label_found_is_compared_with_the_clients():
    table, _ = common.attack_each(lambda seed: small_cnn(seed, bias=True), IMAGES, LABELS, [0])
    assert table.label_found.tolist() == [True, True] and table.label_found.dtype == bool


def test_a_wrong_label_is_not_counted_as_found(monkeypatch):
    monkeypatch.setattr(common, "reconstruct", lambda *args, **options: rgap.reconstruct(*args, labels=[1], **options))
    table, _ = common.attack_each(small_cnn, IMAGES[:1], LABELS[:1], [0])
    assert table.label_found.tolist() == [False] and table.verdict.tolist() == ["inconsistent"]


def test_no_runs_make_an_empty_table():
    table, results = common.attack_each(small_cnn, IMAGES, LABELS, [])
    assert isinstance(table, pd.DataFrame) and table.empty and results == []


def test_every_size_and_seed_has_a_row_that_says_how_well_it_went():
    images, labels = batch(9)
    table, results = common.attack_batches(lambda seed: fcn(seed=seed), images, labels, [1, 4], [0, 1], dtype="float64")
    assert table[["batch", "seed"]].to_numpy().tolist() == [[1, 0], [1, 1], [4, 0], [4, 1]]
    assert (table["found"] == table["batch"]).all() and (table["certified"] == table["batch"]).all()
    assert not table["false"].any() and table["mse"].max() < 1e-18 and (table["label_share"] == 1).all()
    assert (
        table["cosine"].min() > common.SAME_IMAGE_COSINE and [r.verdict for r in results] == table["verdict"].tolist()
    )


def test_a_false_image_is_counted():
    images, labels = batch(4)
    network = fcn()
    result = rgap.reconstruct(
        network, rgap.client_gradients(network, images, labels), (1, 6, 6), batch_size=4, gradient_scale=1.0
    )
    true = common.batch_outcome(result, images, labels)
    other = images.clone()
    other[2] = 1 - other[2]
    swapped = common.batch_outcome(result, other, labels)
    assert true["false"] == 0 and swapped["false"] == 1 and swapped["mse"] > 1e-3 > true["mse"]


def test_a_result_without_images_has_an_outcome():
    images, labels = batch(12)
    network = fcn((24, 12))
    result = rgap.reconstruct(
        network, rgap.client_gradients(network, images, labels), (1, 6, 6), batch_size=12, gradient_scale=1.0
    )
    outcome = common.batch_outcome(result, images, labels)
    assert outcome["found"] == outcome["certified"] == 0 and pd.isna(outcome["psnr_db"])


def test_an_image_is_stretched_to_the_range_of_pixels():
    stretched = common.rescale(5 - 10 * rand(3, 4, 4))
    assert stretched.min() == 0 and stretched.max() == 1
    image = rand(3, 4, 4)
    torch.testing.assert_close(common.rescale(7 * image + 2), common.rescale(image))
    assert not common.rescale(torch.full((1, 2, 2), 3.0)).any()
