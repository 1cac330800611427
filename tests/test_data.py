import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import datasets

from rgap import data
from rgap.data import load_images


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def class_folders(tmp_path):
    """Two images in each of three folders, 8×8, with things that are no images among them."""
    for label, name in enumerate(("a", "b", "c")):
        for i in range(2):
            save(tmp_path / name / f"{i}.png", np.full((8, 8, 3), 100 * label + i, np.uint8))
        (tmp_path / name / "notes.txt").write_text("no image")
        (tmp_path / name / "._0.png").write_bytes(b"hidden")
    (tmp_path / ".thumbnails").mkdir()
    save(tmp_path / ".thumbnails" / "0.png", random_pixels(8, 8))
    return tmp_path


@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 28, 28), (3, 224, 224), (1, 20, 30), (3, 1, 1)])
def test_images_have_the_shape_range_and_types_that_the_docstring_says(image_shape):
    images, labels = load_images("embedded", 5, image_shape)
    assert (images.shape, images.dtype) == ((5, *image_shape), torch.float32)
    assert (labels.shape, labels.dtype) == ((5,), torch.int64)
    assert images.min() >= 0 and images.max() <= 1
    assert image_shape == (3, 1, 1) or images.std() > 0.1


@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 28, 28)])
def test_seed_and_split_decide_which_images(image_shape):
    images, labels = load_images(count=8, image_shape=image_shape, seed=3)
    again, same_labels = load_images(count=8, image_shape=image_shape, seed=3)
    assert images.equal(again) and labels.equal(same_labels)
    assert not images.equal(load_images(count=8, image_shape=image_shape, seed=4)[0])
    assert not images.equal(load_images(count=8, image_shape=image_shape, seed=3, split="train")[0])
    assert len({image.numpy().tobytes() for image in images}) == 8


@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 28, 28)])
def test_index_overrules_seed_and_count_and_keeps_its_order(image_shape):
    images, labels = load_images(image_shape=image_shape, index=[9, 2, 5], count=1, seed=1)
    assert len(images) == 3
    for image, label, index in zip(images, labels, (9, np.int64(2), torch.tensor(5)), strict=True):
        single, single_label = load_images(image_shape=image_shape, index=index, seed=7)
        assert single.equal(image[None]) and single_label.equal(label[None])


def test_embedded_labels_name_the_photograph_or_tell_faces_from_the_rest():
    _, labels = load_images(index=range(12))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert load_images(index=range(6), classes=2)[1].tolist() == [0, 1, 0, 1, 0, 1]
    for split in ("train", "test"):
        _, labels = load_images(image_shape=(1, 28, 28), index=range(100), split=split)
        assert labels.tolist() == [1] * 50 + [0] * 50


def test_embedded_images_are_those_of_the_committed_figures():
    """Means of the first six crops and four faces: a changed draw or resize would silently change every figure."""
    images, _ = load_images(index=range(6))
    faces, _ = load_images(image_shape=(1, 28, 28), index=[0, 1, 98, 99])
    expected = torch.tensor([0.4832, 0.4234, 0.3453, 0.0777, 0.426, 0.3435, 0.4387, 0.4317, 0.4401, 0.043])
    assert_close(torch.cat([images.mean((1, 2, 3)), faces.mean((1, 2, 3))]), expected, rtol=0, atol=1e-3)


def test_class_folders_are_read_in_sorted_order_with_labels_by_folder(class_folders):
    images, labels = load_images(f"folder:{class_folders}", image_shape=(3, 8, 8), index=range(6))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 100, 101, 200, 201]
    assert load_images(f"folder:{class_folders}", index=range(6), classes=2)[1].tolist() == [0, 0, 1, 1, 0, 0]


def test_flat_folder_with_spaces_in_its_name_has_label_zero(tmp_path):
    folder = tmp_path / "my own images"
    save(folder / "b.PNG", np.full((4, 4), 20, np.uint8))
    save(folder / "a.jpeg", np.full((4, 4, 3), 10, np.uint8))
    (folder / "empty folder").mkdir()
    images, labels = load_images(f"folder:{folder}", image_shape=(1, 4, 4), index=[0, 1])
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [10, 20]
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("prefix", [False, True])
def test_cifar10_class_folders_map_to_machine_and_animal(tmp_path, prefix):
    for number, name in enumerate(data.CIFAR10_CLASSES):
        save(tmp_path / (f"{number}-{name}" if prefix else name) / "0.png", random_pixels(4, 4, 3))
    _, labels = load_images(f"folder:{tmp_path}", index=range(10), classes=2)
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    pixels = random_pixels(32, 32, 3)
    save(tmp_path / "0.png", pixels)
    images, _ = load_images(f"folder:{tmp_path}", index=0)
    assert images[0].equal(torch.from_numpy(pixels / 255).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("size", "shape"),
    [((40, 90), (3, 20, 20)), ((90, 40), (3, 20, 20)), ((40, 40), (3, 20, 10)), ((5, 7), (3, 20, 30))],
)
def test_other_sizes_keep_their_aspect_by_a_centre_crop(tmp_path, size, shape):
    """The image is a horizontal ramp, which resizing keeps a ramp of the cropped part."""
    height, width = size
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
    save(tmp_path / "0.png", ramp)
    images, _ = load_images(f"folder:{tmp_path}", image_shape=shape, index=0)
    assert images.shape == (1, *shape)
    kept = min(width, round(height * shape[2] / shape[1])) / width
    assert_close(images.mean().item(), 0.5, rtol=0, atol=0.02)
    assert_close((images[..., -1] - images[..., 0]).mean().item(), kept, rtol=0, atol=0.15)


def test_resizing_down_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "0.png", stripes)
    images, _ = load_images(f"folder:{tmp_path}", image_shape=(1, 8, 8), index=0)
    assert_close(images, torch.full_like(images, 0.5), rtol=0, atol=0.05)


def test_colour_and_grey_are_converted_into_each_other(tmp_path):
    save(tmp_path / "0.png", np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8))
    save(tmp_path / "1.png", np.array([[0, 51], [102, 255]], np.uint8))
    grey, _ = load_images(f"folder:{tmp_path}", image_shape=(1, 2, 2), index=0)
    assert_close(grey[0, 0], torch.tensor([[0.299, 0.587], [0.114, 1.0]]))
    colour, _ = load_images(f"folder:{tmp_path}", image_shape=(3, 2, 2), index=1)
    assert_close(colour[0], torch.tensor([[0.0, 0.2], [0.4, 1.0]]).expand(3, 2, 2))


def test_unusual_files_show_what_a_viewer_shows(tmp_path):
    colours = np.array([[[200, 0, 0], [0, 0, 100]]], np.uint8)
    save(tmp_path / "alpha.png", np.dstack([colours, np.array([[255, 0]], np.uint8)]))
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    save(tmp_path / "turned.png", colours, exif=exif)
    save(tmp_path / "wide.png", np.array([[0, 65535]], np.uint16))
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "x.tiff")
    images, _ = load_images(f"folder:{tmp_path}", image_shape=(3, 1, 2), index=range(5))
    red, blue, white = [200 / 255, 0, 0], [0, 0, 100 / 255], [1, 1, 1]
    expected = [[red, white], [red, blue], [blue, red], [[0, 0, 0], white], [red, blue]]
    assert_close(images[:, :, 0].transpose(1, 2), torch.tensor(expected, dtype=torch.float32))


def test_cifar10_is_read_from_the_folder_that_the_environment_names(tmp_path, monkeypatch):
    pixels = random_pixels(5, 3, 32, 32)
    (folder := tmp_path / "cifar-10-batches-py").mkdir()
    batch = {"data": pixels.reshape(5, -1), "labels": [6, 0, 9, 3, 1]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.CIFAR10_CLASSES)}))
    monkeypatch.setenv("RGAP_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    images, labels = load_images("cifar10", index=range(5))
    assert images.equal(torch.from_numpy(pixels / 255).float())
    assert labels.tolist() == [6, 0, 9, 3, 1]
    assert load_images("cifar10", index=range(5), classes=2)[1].tolist() == [1, 0, 0, 1, 0]


def test_mnist_is_read_from_the_folder_that_the_environment_names(tmp_path, monkeypatch):
    pixels = random_pixels(3, 28, 28)
    (folder := tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 3, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes([7, 2, 1]))
    monkeypatch.setenv("RGAP_DATA", str(tmp_path))
    images, labels = load_images("mnist", image_shape=(1, 28, 28), index=[0, 1, 2])
    assert images.equal(torch.from_numpy(pixels / 255).float()[:, None])
    assert labels.tolist() == [7, 2, 1]
    assert load_images("mnist", image_shape=(1, 28, 28), index=[0, 1, 2], classes=2)[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("source", ["cifar10", "mnist"])
def test_without_a_network_the_error_names_the_folder_and_its_files(source, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network\nand more lines")

    monkeypatch.setenv("RGAP_DATA", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(FileNotFoundError) as error:
        load_images(source)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (str(tmp_path), data.DOWNLOADS[source], "RGAP_DATA"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "imagenet"}, ValueError, "source is 'imagenet'; it must be"),
        ({"source": "folder:"}, ValueError, "source is 'folder:'"),
        ({"source": "folder:/no/such"}, FileNotFoundError, "no folder /no/such"),
        ({"count": 0}, ValueError, "empty batch"),
        ({"count": 1001}, ValueError, "count is 1001, but 'embedded' has 1000"),
        ({"index": []}, ValueError, "empty sequence"),
        ({"index": 1000}, ValueError, "index 1000 is out of range.* 0 to 999"),
        ({"index": [0, -1]}, ValueError, "index -1 is out of range"),
        ({"image_shape": (32, 32)}, ValueError, r"image_shape is \(32, 32\)"),
        ({"image_shape": (2, 32, 32)}, ValueError, "C = 1 or 3"),
        ({"image_shape": (3, 0, 32)}, ValueError, "each at least 1"),
        ({"image_shape": (3, 32.5, 32)}, ValueError, "image_shape"),
        ({"split": "validation"}, ValueError, "split is 'validation'"),
        ({"classes": 10}, ValueError, "classes is 10"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        load_images(**arguments)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=f"no image in {tmp_path}"):
        load_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("how", ["empty", "no image", "cut off", "floating point"])
def test_a_broken_image_is_named(tmp_path, how):
    path = tmp_path / ("0.tiff" if how == "floating point" else "0.png")
    if how == "floating point":
        save(path, np.ones((4, 4), np.float32))
    else:
        save(path, random_pixels(64, 64, 3))
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "no image": b"text", "cut off": whole[: len(whole) // 2]}[how])
    with pytest.raises(ValueError, match=str(path)):
        load_images(f"folder:{tmp_path}", index=0)
