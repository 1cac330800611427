from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import rgap
from rgap.experiments import reconstruction_cli as reconstruction


def run(folder, *arguments):
    return reconstruction.main([*arguments, "--output", str(folder)])


def read(path):
    return np.asarray(Image.open(path)) / 255


@pytest.mark.parametrize("model", ["cnn6", "fcn3"])
def test_leaves_three_pictures_and_a_table_and_prints_a_handful_of_lines(tmp_path, capsys, model):
    assert run(tmp_path, "--model", model, "--index", "6") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["verdict", "labels", "PSNR", "attack", "written"]
    assert printed[0].split()[1] == "exact"
    assert float(printed[2].split()[1]) > 80
    folder = tmp_path / f"{model}_embedded_6"
    origin, found, rescaled = (
        read(folder / f"{n}.png") for n in ("origin", "reconstruction", "reconstruction_rescaled")
    )
    shape = rgap.models.IMAGE_SHAPES[model]
    assert origin.shape == (shape[1:] if shape[0] == 1 else (*shape[1:], 3))
    assert abs(origin - found).max() < 1.5 / 255
    assert (rescaled.min(), rescaled.max()) == (0, 1)
    assert len(pd.read_csv(folder / "layers.csv")) == {"cnn6": 7, "fcn3": 3}[model]


def test_a_folder_of_images_with_spaces_gives_a_plain_name(tmp_path):
    (tmp_path / "my images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my images" / "0.png")
    assert run(tmp_path, "--model", "fcn3", "--data", f"folder:{tmp_path}/my images") == 0
    (folder,) = tmp_path.glob("fcn3_folder-*-my-images_0")
    assert abs(read(folder / "reconstruction.png") * 255 - pixels).max() < 1.5


def test_images_of_a_batch_are_compared_each_with_its_own(tmp_path, capsys, monkeypatch):
    images, labels = rgap.data.load_images(index=[5, 6])
    found = SimpleNamespace(
        images=images.flip(0).double() + 1e-3, labels=labels.flip(0), verdict="exact", to_frame=pd.DataFrame
    )
    monkeypatch.setattr(rgap, "reconstruct", lambda *_, **__: found)
    assert run(tmp_path, "--index", "5", "--batch", "2") == 0
    assert "PSNR     60.0, 60.0 dB" in capsys.readouterr().out
    for name in ("origin", "reconstruction", "reconstruction_rescaled"):
        assert {path.name for path in (tmp_path / "cnn6_embedded_5").glob(f"{name}_?.png")} == {
            f"{name}_5.png",
            f"{name}_6.png",
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "model is 'resnet'; give cnn6, cnn6_d, cnn6_batch, fcn3, lenet"),
        (["--data", "folder:/no/such"], "there is no folder /no/such"),
        (["--data", "imagenet"], "source is 'imagenet'"),
        (["--loss", "hinge"], "unknown loss 'hinge'"),
        (["--shape", "3,20,20"], "an image of shape (3, 20, 20) does not pass cnn6: RuntimeError: mat1 and mat2"),
        (["--index", "-1"], "index -1 is out of range"),
        (["--batch", "0"], "batch is 0; an empty batch"),
    ],
)
def test_bad_arguments_get_one_line_and_exit_with_two(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"reconstruction: {message}")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_images_than_the_batch_are_counted_and_what_is_there_is_written(tmp_path, capsys, monkeypatch, count):
    images, labels = rgap.data.load_images(index=[5])
    found = SimpleNamespace(
        images=images[:count].double(), labels=labels[:count], verdict="rank-deficient", to_frame=pd.DataFrame
    )
    monkeypatch.setattr(rgap, "reconstruct", lambda *_, **__: found)
    assert run(tmp_path, "--index", "5", "--batch", "2") == 0
    assert f"found    {count} of 2 images" in capsys.readouterr().out
    assert len(list((tmp_path / "cnn6_embedded_5").glob("reconstruction_?.png"))) == count


def test_a_network_of_ones_own_is_attacked_with_the_loss_that_fits_its_outputs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LeakyReLU(), nn.Linear(32, 6))\n"
    )
    assert run(tmp_path / "out", "--model", "own_network:net", "--shape", "3,8,8", "--index", "4") == 0
    printed = capsys.readouterr().out
    assert "verdict  exact" in printed and "labels   [4] (true: [4])" in printed
    assert (tmp_path / "out" / "own_network-net_embedded_4" / "reconstruction.png").is_file()


def test_lenet_with_ten_classes_is_there_to_be_tried(tmp_path, capsys):
    assert run(tmp_path, "--model", "lenet", "--index", "2") == 0
    assert "labels   [2] (true: [2])" in capsys.readouterr().out
