import pandas as pd
import torch
from cases import rand, small_cnn

import rgap
from rgap.experiments import sweeps
from rgap.ranks.rebuild import with_convolution

SHAPE = (3, 8, 8)


def test_what_is_audited_as_a_leak_is_recovered_and_what_stops_is_not():
    narrow = with_convolution(small_cnn(), SHAPE, "0", out_channels=2)
    networks = {"small": small_cnn(), "narrow": narrow}
    runs = sweeps.audited_and_attacked(networks, rand(1, *SHAPE), torch.tensor([1]))
    assert runs["network"].tolist() == ["small", "narrow"]
    assert runs["outcome"].tolist() == ["leaks", "stops"]
    assert runs["verdict"].tolist() == ["exact", "rank-deficient"] and runs["agrees"].all()
    assert runs["psnr_db"][0] > 100 > runs["psnr_db"][1]
    assert runs["missing"][0] == 0 < runs["missing"][1]


def test_a_stronger_defence_leaves_less():
    chain, image = rgap.prepare(small_cnn(), SHAPE), rand(1, *SHAPE)
    gradients = rgap.client_gradients(small_cnn(), image, torch.tensor([1]))
    table, found = sweeps.attacks_under_defence(chain, gradients, image, "gaussian_noise", [0, 1e-8, 1e-2])
    assert found.shape == (3, *SHAPE) and isinstance(table, pd.DataFrame)
    assert table["psnr_db"].is_monotonic_decreasing and table["verdict"][0] == "exact" != table["verdict"][2]
