"""What stands beside published results."""

import torch

from rgap.data import load_images
from rgap.experiments.published import PUBLISHED, compare, dlg_convnet, plot_comparison, r_conv_network


def test_networks_have_the_size_that_their_sources_print():
    assert sum(p.numel() for p in dlg_convnet().parameters()) == 2_904_970
    # breaching prints 154,266 for R-GAP's CNN6 with ten classes, and 22,049,896 for its ViT-S/16, whose first block
    # lacks the 768 parameters of one layer norm.
    assert sum(p.numel() for p in PUBLISHED[0].build().parameters()) == 154_266
    assert sum(p.numel() for p in PUBLISHED[2].build().parameters()) == 22_049_896 + 768


def test_weights_of_r_conv_are_drawn_as_its_notebooks_draw_them():
    """The seed, then torch's default draws for every layer, then ±0.5 for every weight and bias in turn."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(50)
        torch.set_default_dtype(torch.float64)
        try:
            convs = [torch.nn.Conv2d(3, 12, 5, 2, 2), torch.nn.Conv2d(12, 16, 5, 2, 2)]
            layers = [*convs, torch.nn.Linear(1024, 10)]
        finally:
            torch.set_default_dtype(dtype)
        for layer in layers:
            layer.weight.data.uniform_(-0.5, 0.5)
            layer.bias.data.uniform_(-0.5, 0.5)
    expected = [p for layer in layers for p in layer.parameters()]
    drawn = list(r_conv_network((12, 16), 2, classes=10).parameters())
    assert all(torch.equal(a, b) for a, b in zip(expected, drawn, strict=True))


def test_small_images_are_attacked_and_drawn():
    images, _ = load_images("embedded", index=[0], image_shape=(3, 32, 32))
    table = compare(PUBLISHED[-1:], {32: images}, count=1)
    assert table.loc[0, "exact"] == 1
    assert table.loc[0, "gain_db"] > 0
    figure = plot_comparison(table)
    assert figure.axes[0].get_title().startswith("1 of 1")
    assert "dB" in figure.axes[0].get_xlabel()
