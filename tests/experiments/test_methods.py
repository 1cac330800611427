import os

import numpy as np
import pandas as pd
import pytest
import torch
from cases import rand, rendered, small_cnn

import rgap
from rgap import models
from rgap.experiments import methods as experiment
from rgap.experiments.side_by_side import run_each

IMAGES, LABELS = rand(2, 3, 8, 8, seed=21).float(), torch.tensor([0, 1])
STEPS = {"DLG": 4, "Inverting Gradients": 4, "hybrid": 4}


@pytest.fixture
def small(monkeypatch):
    """A small network under the name of a large one."""
    monkeypatch.setattr(models, "cnn6", lambda seed: small_cnn(seed).float())
    return {"cnn6": (IMAGES, LABELS)}


def test_every_run_has_its_row_its_trajectory_and_its_image(small):
    runs, trajectories, found = experiment.compare_methods(small, [0, 1], STEPS)
    assert len(runs) == 2 * 2 * 5 and list(runs["method"][:5]) == list(experiment.METHODS)
    assert set(found) == {("cnn6", method) for method in experiment.METHODS}
    assert all(images.shape == (2, 3, 8, 8) for images in found.values())
    closed = runs[runs["method"].isin(experiment.METHODS[:2])]
    assert (closed["psnr_db"] > 80).all() and (closed["seconds_prepared"] > 0).all()
    assert runs[~runs.index.isin(closed.index)]["seconds_prepared"].isna().all()
    one = trajectories.query("method == 'DLG' and seed == 1 and image == 0")
    assert one["step"].tolist()[:4] == [1, 2, 3, 4] and one["seconds"].is_monotonic_increasing
    assert (runs["seconds_to_best"] <= runs["seconds"]).all()
    first = rgap.metrics.psnr_db(found["cnn6", "DLG"][:1], IMAGES[:1]).item()
    assert first == pytest.approx(runs.query("method == 'DLG' and seed == 0 and image == 0")["psnr_db"].item())


def test_attacks_get_the_gradient_and_no_image(small, monkeypatch):
    calls = []

    def spy(name, attack):
        def call(model, gradients, shape, **options):
            calls.append((name, [g.clone() for g in gradients], options))
            return attack(model, gradients, shape, **options)

        return call

    def closed(model, gradients, shape, **options):
        calls.append(("closed", [g.clone() for g in gradients], options))
        return rgap.reconstruct(model, gradients, shape, **options)

    for name, attack in experiment.OPTIMISERS.items():
        monkeypatch.setitem(experiment.OPTIMISERS, name, spy(name, attack))
    monkeypatch.setattr(experiment, "hybrid", spy("hybrid", experiment.hybrid))
    monkeypatch.setattr(experiment, "reconstruct", closed)
    experiment.compare_methods({"cnn6": (IMAGES[:1], LABELS[:1])}, [0], STEPS)
    assert {name for name, _, _ in calls} == {"closed", "DLG", "Inverting Gradients", "hybrid"}
    for _, gradients, options in calls:
        assert all(torch.equal(a, b) for a, b in zip(gradients, calls[0][1], strict=True))
        assert set(options) <= {"labels", "steps", "seed", "virtual_constraints", "gradient_scale", "effort"}


def table(**columns):
    keys = {"network": ["a", "a", "b", "b"], "method": ["virtual constraints", "DLG"] * 2, "seed": 0, "image": 0}
    return pd.DataFrame(keys | columns)


def test_tables_are_means_deviations_and_ratios():
    runs = table(mse=[1e-9, 0.1, 1e-9, 1e-12], psnr_db=[90.0, 10.0, 90.0, 120.0], seconds=[1.0, 50.0, 2.0, 9.0])
    runs = runs.assign(seconds_prepared=[0.5, np.nan, 1.0, np.nan], seconds_to_best=[1.0, 40.0, 2.0, 6.0])
    quality = experiment.quality_table(pd.concat([runs, runs.assign(psnr_db=runs["psnr_db"] + 2)]))
    assert quality["psnr_db"].tolist() == [91, 11, 91, 121] and quality["runs"].tolist() == [2] * 4
    assert quality["psnr_db_std"].tolist() == [1.4] * 4
    assert experiment.time_ratios(runs).tolist() == [40, 3]
    assert experiment.time_ratios(runs, column="seconds_prepared").tolist() == [80, 6]
    won = experiment.networks_won(runs, rivals=["DLG"]).set_index("network")
    assert won["ahead"].to_dict() == {"a": True, "b": False} and won.loc["a", "best_rival"] == 10
    times = experiment.time_table(runs)
    assert times["cores"].tolist() == [os.cpu_count()] * 4 and set(times["torch"]) == {torch.__version__}
    assert set(times["dtype"]) == {"float32"} and times["seconds"].tolist() == [1, 50, 2, 9]


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with experiment.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_soundness_runs_each_optimiser_on_its_own_network_and_infers_the_label():
    images, labels = rand(2, 3, 32, 32, seed=5).float(), torch.tensor([3, 7])
    runs, found = experiment.soundness(images, labels, {"DLG": 3, "Inverting Gradients": 2})
    assert runs["method"].tolist() == ["DLG"] * 2 + ["Inverting Gradients"] * 2 and runs["label_found"].all()
    assert {name: tuple(x.shape) for name, x in found.items()} == dict.fromkeys(found, (2, 3, 32, 32))
    first, other = (experiment.wide_lenet(seed)[0].weight for seed in (3, 4))
    assert first.abs().max() <= 0.5 and not first.equal(other)
    state = torch.get_rng_state()
    assert experiment.small_convnet()(images).shape == (2, 10) and torch.get_rng_state().equal(state)


@pytest.mark.slow
def test_the_optimisers_are_sound():
    images, labels = rgap.data.load_images("embedded", count=2)  # five in notebook 04
    runs, _ = experiment.soundness(images, labels, {"DLG": 600, "Inverting Gradients": 150})
    assert (runs["psnr_db"] >= 25).all(), runs


def test_a_dask_cluster_of_two_workers_does_the_same_work(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    images = {"fcn3": (rand(2, 1, 28, 28, seed=2).float(), LABELS)}
    options = {"seeds": [0], "steps": STEPS, "methods": ["virtual constraints", "DLG"]}
    here, _, _ = experiment.compare_methods(images, **options)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        pids = run_each(os.getpid, [()] * 8, scheduler=cluster.scheduler_address)
        monkeypatch.setenv("RGAP_SCHEDULER", cluster.scheduler_address)
        there, _, _ = experiment.compare_methods(images, **options)
    assert os.getpid() not in pids
    columns = ["network", "seed", "image", "method", "verdict"]
    pd.testing.assert_frame_equal(here[columns], there[columns])
    np.testing.assert_allclose(here["psnr_db"], there["psnr_db"], atol=1.0)


def test_quality_against_time_has_a_line_an_image_and_a_marker_a_method():
    rows = [
        ("cnn6", 0, image, method, 0, step, 0.1 * step, 10.0 * step)
        for image in (0, 1)
        for method, steps in (("R-GAP", [1]), ("DLG", [1, 2, 3]))
        for step in steps
    ]
    names = ["network", "seed", "image", "method", "restart", "step", "seconds", "psnr_db"]
    figure = experiment.plot_quality_against_time(
        pd.DataFrame(rows, columns=names), {"R-GAP": "ours", "DLG": "DLG"}, ["cnn6"]
    )
    (axis,) = rendered(figure)
    assert axis.get_xscale() == "log" and "PSNR" in axis.get_ylabel() and len(axis.lines) == 4
    assert [text.get_text() for text in axis.texts] == ["ours", "DLG"]
