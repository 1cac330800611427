"""How results look: one line, and in a notebook pictures, verdict and table."""

import base64
import io
import re

import pytest
import torch
from cases import rand, small_cnn
from PIL import Image

import rgap
from rgap.results import display

SHAPE = (3, 8, 8)
IMAGES, LABELS = rand(4, *SHAPE), torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def result():
    model = small_cnn(bias=True)
    return rgap.reconstruct(model, rgap.client_gradients(model, IMAGES[:1], LABELS[:1]), SHAPE)


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_a_reconstruction_is_one_line(result):
    assert re.fullmatch(
        r"<Reconstruction 'exact': 1 image of shape \(3, 8, 8\), labels \[0\], gradient residual \S+>", repr(result)
    )
    ranks = rgap.rank_analysis(small_cnn(bias=True), SHAPE)
    assert repr(ranks) == f"<RankAnalysis of 3 layers, 1 image behind the gradient: {ranks.verdict}>"


def test_a_notebook_shows_verdict_pictures_table_and_notes(result):
    page = result._repr_html_()
    (picture,) = pictures(page)
    assert picture.size == (96, 96) and "exact" in page and "<td>0</td>" in page.replace("<td>5</td>", "")
    pixels = torch.tensor(list(picture.resize((8, 8), Image.Resampling.NEAREST).tobytes())).reshape(8, 8, 3) / 255
    assert (pixels.permute(2, 0, 1) - IMAGES[0]).abs().max() < 1 / 255
    page = rgap.rank_analysis(small_cnn(bias=True), SHAPE)._repr_html_()
    assert "convolution" in page and "linear" in page and not pictures(page)


def test_every_candidate_is_shown_and_text_is_escaped(result):
    two = type(result)(**{**vars(result), "candidates": result.candidates * 2, "notes": ("a < b",)})
    page = two._repr_html_()
    assert len(pictures(page)) == 2 and "candidate 1" in page and "a &lt; b" in page


def test_what_leaves_the_pixel_range_is_stretched_and_says_so():
    assert "stretched" in display.figure(5 - 9 * IMAGES[0], "x") and "stretched" not in display.figure(IMAGES[0], "x")


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 8), (5, 4), (7,)])
def test_images_of_any_shape_have_a_picture(shape):
    (picture,) = pictures(display.figure(rand(*shape) * torch.nan, "<>"))
    assert picture.mode == "L"


def test_optimisers_results_are_one_line_too():
    model = small_cnn(bias=True)
    found = rgap.baselines.dlg(model, rgap.client_gradients(model, IMAGES[:1], LABELS[:1]), SHAPE, steps=2)
    assert repr(found).startswith("<Optimised ") and len(repr(found)) < 200
    assert pictures(found._repr_html_())
