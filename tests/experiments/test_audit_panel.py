import datetime
import io

import numpy as np
import pytest
from cases import small_cnn
from PIL import Image
from torch import nn

import rgap
from rgap import client
from rgap.experiments import audit_panel as experiment
from rgap.experiments.audit import DEFENCES
from rgap.experiments.audit_panel import AttackPanel

SHAPE = (3, 8, 8)
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def chain():
    return rgap.prepare(small_cnn(), SHAPE)


@pytest.fixture
def panel(chain):
    return AttackPanel(chain, SHAPE, index=3)


def upload(control, name, content):
    control.value = ({"name": name, "type": "", "size": len(content), "content": content, "last_modified": NOW},)


def gradients(index=3):
    image, label = rgap.data.load_images(image_shape=SHAPE, index=index, classes=2)
    return image, client.client_gradients(small_cnn(), image, label)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shown(picture):
    return np.asarray(Image.open(io.BytesIO(picture.value)))


def test_at_first_the_undefended_gradient_gives_the_image_away(panel):
    assert panel.result.verdict == "exact"
    assert "<b>exact</b>, PSNR " in panel.status.value
    assert shown(panel.origin).shape == (256, 256, 3)
    assert np.abs(shown(panel.origin).astype(int) - shown(panel.found)).max() <= 1


def test_the_slider_changes_the_picture_and_back(panel):
    first = panel.found.value
    panel.strength.value = 1e-3
    assert panel.found.value != first and panel.result.verdict != "exact"
    panel.strength.value = 0
    assert panel.found.value == first


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_has_strengths_of_which_the_first_is_none(panel, defence):
    exact = panel.found.value
    panel.defence.value = defence
    assert panel.strength.options[0][0] == "none" and panel.found.value == exact
    panel.strength.value = panel.strength.options[-1][1]
    assert panel.found.value != exact


def test_a_change_of_defence_lifts_the_one_before(panel):
    exact = panel.found.value
    panel.strength.value = 1e-3
    panel.defence.value = "prune"
    assert panel.found.value == exact


def test_another_image_and_one_of_the_users_own(panel):
    panel.place.value = 4
    assert np.allclose(panel.result.images, gradients(4)[0], atol=1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE[::-1], dtype=np.uint8)
    upload(panel.image_file, "My face.PNG", png(pixels))
    assert np.abs(panel.result.images[0].permute(1, 2, 0).numpy() * 255 - pixels).max() < 1


@pytest.mark.parametrize("name", ["shared.safetensors", "shared.pt"])
def test_a_gradient_from_a_file_needs_no_original(panel, tmp_path, name):
    image, shared = gradients(4)
    upload(panel.gradient_file, name, client.save_gradients(tmp_path / name, shared).read_bytes())
    assert np.allclose(panel.result.images, image, atol=1e-6)
    assert panel.origin.value == b"" and "PSNR" not in panel.status.value


def test_what_is_refused_is_said_in_the_panel_and_the_next_image_works_again(panel):
    for act, message in [
        (lambda: upload(panel.image_file, "x.png", b"no picture"), "is no readable image"),
        (lambda: upload(panel.gradient_file, "x.npz", b""), "ends in &#x27;.npz&#x27;"),
        (lambda: setattr(panel.place, "value", 10**6), "is out of range"),
    ]:
        act()
        assert panel.status.value.startswith("<b>refused</b>: ") and message in panel.status.value
        assert panel.result is None and panel.found.value == b""
    panel.place.value = 2
    assert panel.result.verdict == "exact"


def test_where_a_program_runs_the_notebook_a_line_of_text_takes_the_controls_place(chain, monkeypatch):
    monkeypatch.setenv("RGAP_PROFILE", "default")
    assert "make lab" in experiment.controls(chain, SHAPE)
    monkeypatch.delenv("RGAP_PROFILE")
    assert len(experiment.controls(chain, SHAPE, index=1).children) == 4


def test_grey_images_are_shown_as_they_are():
    panel = AttackPanel(rgap.models.fcn3(widths=(60, 20)), (1, 28, 28))
    assert shown(panel.origin).shape == (252, 252)


@pytest.mark.parametrize(("classes", "loss"), [(1, None), (1, "mse"), (4, None), (4, "mse")])
def test_the_panels_loss_follows_from_the_outputs_unless_it_is_given(classes, loss):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).double()
    panel = AttackPanel(model, SHAPE, loss=loss)
    assert panel.loss == (loss or ("logistic" if classes == 1 else "cross_entropy"))
    assert panel.result is not None or "refused" in panel.status.value
