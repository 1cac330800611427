import math

import pytest
import torch
from cases import rand, small_cnn

import rgap
from rgap.experiments import noise_sample as experiment

SHAPE, IMAGES, LABELS = (3, 8, 8), rand(2, 3, 8, 8), torch.tensor([0, 1])


@pytest.mark.slow
def test_forty_noisy_attacks_without_a_false_certificate():
    sample = experiment.sample_noisy_attacks(40, seed=1)
    assert list(sample.columns[:3]) == ["case", "verdict", "psnr_db"] and len(sample) == 40
    assert sample["ok"].all(), sample[~sample["ok"]].to_string()
    assert (sample["verdict"] == "exact").sum() >= 5 and sample["psnr_db"].notna().all()


def test_the_sample_sees_exceptions_nan_and_false_certificates(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(experiment, "reconstruct", broken)
    failed = experiment.sample_noisy_attacks(2)
    assert failed["why"].tolist() == ["RuntimeError: no convergence"] * 2 and not failed["ok"].any()
    result = rgap.reconstruct(
        small_cnn(), rgap.client_gradients(small_cnn(), IMAGES[:1], LABELS[:1]), SHAPE, gradient_scale=1.0
    )
    assert experiment._complaint(result, {"predicted": 1e-9, "rmse": 0.1}).startswith("certified, and off by 0.1")
    assert experiment._complaint(result, {"predicted": 0.05, "rmse": 0.1}) == ""
    lost = [rgap.Candidate(math.nan * c.images, c.labels, 0.0, True) for c in result.candidates]
    nan = rgap.Reconstruction(result.images, result.labels, "inconsistent", tuple(lost), ())
    assert experiment._complaint(nan, {}) == "the image holds NaN or infinity"
