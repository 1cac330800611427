import math

import pandas as pd
import pytest
import torch
from cases import SECOND, convs, rand, small_cnn
from torch.testing import assert_close

import rgap
from rgap.experiments import sweeps
from rgap.experiments.sweeps import attack_each, attacks, layer_errors, wrong_signs

IMAGES, LABELS = rand(2, 3, 8, 8), torch.tensor([0, 1])
DEFICIENT = {"make_model": lambda seed: convs(*SECOND, seed=seed), "images": rand(1, 3, 12, 12), "labels": LABELS[:1]}


def test_every_image_seed_and_dtype_has_a_row_and_a_result_in_the_same_order():
    table, results = attack_each(small_cnn, IMAGES, LABELS, [3, 4], ["float32", "float64"])
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

    monkeypatch.setattr(attacks, "reconstruct", spy)
    attack_each(small_cnn, IMAGES, LABELS, [0], rcond=1e-6)
    expected = {"loss": "logistic", "rcond": 1e-6}
    assert [(dtype, options) for _, dtype, options in calls] == [(torch.float32, expected)] * 2
    assert isinstance(calls[0][0], rgap.Chain) and calls[0][0] is calls[1][0]


def test_the_label_found_is_compared_with_the_clients():
    table, _ = attack_each(lambda seed: small_cnn(seed, bias=True), IMAGES, LABELS, [0])
    assert table.label_found.tolist() == [True, True] and table.label_found.dtype == bool


def test_a_wrong_label_is_not_counted_as_found(monkeypatch):
    monkeypatch.setattr(attacks, "reconstruct", lambda *args, **options: rgap.reconstruct(*args, labels=[1], **options))
    table, _ = attack_each(small_cnn, IMAGES[:1], LABELS[:1], [0])
    assert table.label_found.tolist() == [False] and table.verdict.tolist() == ["inconsistent"]


def test_no_runs_make_an_empty_table():
    table, results = attack_each(small_cnn, IMAGES, LABELS, [])
    assert isinstance(table, pd.DataFrame) and table.empty and results == []


def test_layer_errors_are_relative_to_the_true_inputs():
    network = small_cnn(bias=True)
    chain = rgap.prepare(network, (3, 8, 8))
    result = rgap.reconstruct(chain, rgap.client_gradients(network.float(), IMAGES[:1], LABELS[:1]))
    frame = layer_errors(chain, IMAGES[:1], result)
    assert frame.name.tolist() == ["5", "2", "0"] and set(result.to_frame().columns) < set(frame.columns)
    assert frame.error.between(1e-12, 1e-3).all()
    image = result.images - IMAGES[:1]
    assert frame.error.iloc[-1] == pytest.approx((image.norm() / IMAGES[:1].norm()).item())
    twice = layer_errors(chain, IMAGES[1:], result)
    assert twice.error.iloc[-1] == pytest.approx(((result.images - IMAGES[1:]).norm() / IMAGES[1:].norm()).item())


def test_wrong_signs_fall_to_none_where_virtual_constraints_close_the_layer():
    table, (result,) = attack_each(seeds=[0], dtypes=["float64"], **DEFICIENT)
    assert table.verdict.tolist() == ["exact"]
    chain = rgap.prepare(DEFICIENT["make_model"](0), (3, 12, 12))
    history = wrong_signs(chain, DEFICIENT["images"], result)
    assert list(history.columns) == ["layer", "step", "wrong"] and set(history.layer) == {"2"}
    assert history.step.tolist() == list(range(1, len(history) + 1))
    assert history.wrong.iloc[-1] == 0 <= history.wrong.iloc[0]
    truth, beliefs = chain.layer_inputs(DEFICIENT["images"])["2"].flatten(), result.candidates[0].beliefs["2"]
    assert history.wrong.tolist() == [int(((x > 0) != (truth > 0)).sum()) for x in beliefs]
    assert_close(beliefs[-1], truth, rtol=0, atol=1e-3)


def test_without_virtual_constraints_there_is_no_history():
    table, (result,) = attack_each(seeds=[0], virtual_constraints=False, **DEFICIENT)
    assert table.verdict.tolist() == ["rank-deficient"] and math.isfinite(table.psnr_db[0])
    chain = rgap.prepare(DEFICIENT["make_model"](0), (3, 12, 12))
    history = wrong_signs(chain, DEFICIENT["images"], result)
    assert history.empty and list(history.columns) == ["layer", "step", "wrong"]


def test_the_rank_table_has_a_row_for_each_network_and_batch():
    networks = {"cnn6_d": (rgap.models.cnn6_d(), (3, 32, 32)), "fcn3": (rgap.models.fcn3(), (1, 28, 28))}
    table, steps = sweeps.rank_table(networks, [1, 4])
    assert table["network"].tolist() == ["cnn6_d", "cnn6_d", "fcn3", "fcn3"] and table["batch"].tolist() == [1, 4, 1, 4]
    assert table.iloc[0][["steps", "max_ra_index", "by_count", "by_rank", "unknown", "deficit"]].tolist() == [
        *(7, -708, 0, 1, 0, 280)
    ]
    assert len(steps) == 20 and steps.query("network == 'fcn3' and batch == 1")["step"].tolist() == [0, 1, 2]


def test_laws_of_a_sample_are_the_measured_ranks_and_repeat():
    state = torch.get_rng_state()
    sample = sweeps.rank_law_sample(40, seed=3, unknowns=120)
    assert torch.get_rng_state().equal(state)
    assert len(sample) == 120 and sample["law"].notna().mean() > 0.9
    known = sample.dropna(subset="law")
    assert known["law"].eq(known["measured"]).all() and (known["counted"] >= known["measured"]).all()
    pd.testing.assert_frame_equal(sample, sweeps.rank_law_sample(40, seed=3, unknowns=120))


def test_predictions_stand_beside_what_was_measured():
    runs = sweeps.predicted_and_measured({8: small_cnn}, IMAGES, LABELS, [0, 1], virtual_constraints=False)
    assert len(runs) == 4 and (runs["width"] == 8).all() and (runs["deficit"] == 0).all()
    assert (runs["ra_index"] < 0).all() and (runs["psnr_db"] > 60).all()
