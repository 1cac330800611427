"""Images to attack: embedded ones, CIFAR-10 and MNIST, or a folder of the user's own."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from rgap.arguments import check_choice, check_count, check_image_shape, check_labels, check_seed, check_tensor

# Photographs that scikit-image's wheel contains; a label is the place in this tuple.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
SPLIT_SIZE = 1000  # embedded colour images in each split
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MACHINES = {"airplane", "automobile", "ship", "truck"}
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, what "greyscale" means to Pillow and OpenCV
# What torchvision's download unpacks; a user without a network puts these files in place by hand.
MNIST_FILES = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
DOWNLOADS = {"cifar10": "cifar-10-python.tar.gz", "mnist": MNIST_FILES}
SPLITS = ("train", "test")
IMAGE_FILES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class _Source(NamedTuple):
    """Images in a fixed order: labels (N,), the pixels of place i as (H, W) or (H, W, 3) in [0, 1], class names."""

    labels: Sequence[int]
    pixels: Callable[[int], np.ndarray]
    class_names: Sequence[str]


def load_images(
    source: str = "embedded",
    count: int | None = 4,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    index: int | Sequence[int] | None = None,
    seed: int = 0,
    split: str = "test",
    classes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads images and labels, any size brought to `image_shape`.

    An image of another size is cropped around its centre to the wanted aspect and resized (bicubic, antialiased).
    Colour and grey are converted into each other; transparent pixels turn white.

    Args:
        source: One of

            - `"embedded"`: needs no network. Three channels: square crops of scikit-image's photographs, 1000 per
              split; place k shows photograph k modulo 6 and is labelled by it. One channel: scikit-image's 25×25
              faces (1) and non-faces (0), every other one as split `"train"`, the rest as `"test"`, 50 of each kind.
            - `"cifar10"`, `"mnist"`: by torchvision, kept in build/data, or in the folder RGAP_DATA.
            - `"folder:PATH"`: one folder per class in sorted order (ImageFolder), or images alone (label 0). Other
              files and hidden ones are ignored.
        count: How many images to draw at random, without repetition; None takes all, in their order.
        image_shape: (C, H, W) with C = 1 or 3.
        index: Places in the split (in a folder: in sorted order of its paths); overrules `count` and `seed`.
        seed: Seed of the random draw; it does not change which image an index means.
        split: `"train"` or `"test"`; a folder has no splits and takes either.
        classes: 2 maps labels to two (CIFAR-10: machine 0, animal 1; otherwise label modulo 2), None keeps them.

    Returns:
        Images, float32 (N, C, H, W) in [0, 1], and labels, int64 (N,).

    Raises:
        ValueError: If an argument is not one of the above, an index lies outside the split, or a file is no readable
            image.
        FileNotFoundError: If the folder is missing or has no image, or a data set is neither there nor downloadable.

    Example:
        >>> import rgap
        >>> images, labels = rgap.data.load_images("embedded", index=[0, 1], image_shape=(3, 32, 32))
        >>> images.shape, labels.tolist()
        (torch.Size([2, 3, 32, 32]), [0, 1])
    """
    _check_arguments(count, image_shape, seed, split, classes)
    images = _open_source(source, grey=image_shape[0] == 1, split=split)
    places = _places(index, count, seed, len(images.labels), source)
    pixels = torch.stack([_fit(images.pixels(i), image_shape) for i in places])
    labels = torch.tensor([int(images.labels[i]) for i in places])
    return pixels, labels if classes is None else _two_classes(images.class_names)[labels]


def _check_arguments(count, image_shape, seed, split, classes):
    shape = check_image_shape(image_shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"image_shape is {image_shape}; it must be (C, H, W) with C = 1 or 3 and positive H and W")
    if count is not None:
        check_count("count", count, hint=": an empty batch has no gradient")
    check_seed(seed)
    check_choice("split", split, SPLITS)
    if classes is not None and check_count("classes", classes) != 2:
        raise ValueError(f"classes is {classes!r}; it must be None (labels unchanged) or 2 (labels mapped to 0 and 1)")


def _places(index, count, seed, size, source):
    """Which images: the given ones, or `count` different ones drawn by the seed."""
    if index is None:
        if count is None:
            return list(range(size))
        if count > size:
            raise ValueError(f"count is {count}, but {source!r} has {size} images in this split")
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    if isinstance(index, torch.Tensor | np.ndarray | Integral):
        index = torch.atleast_1d(check_tensor("index", np.asarray(index) if isinstance(index, Integral) else index))
    places = check_labels(index, name="index").tolist()
    if not places:
        raise ValueError("index is an empty sequence; give at least one place, or None for random images")
    if outside := [place for place in places if not 0 <= place < size]:
        held = f"{source!r} has {size} images in this split, 0 to {size - 1}"
        raise ValueError(f"index {outside[0]} is out of range; {held}")
    return places


def _open_source(source, *, grey, split):
    name, _, path = source.partition(":") if isinstance(source, str) else ("", "", "")
    if name == "folder" and path:
        return _folder(Path(path).expanduser())
    if source == "embedded":
        return _faces(split) if grey else _crops(split)
    if name in DOWNLOADS and not path:
        return _torchvision(source, split)
    raise ValueError(f"source is {source!r}; it must be 'embedded', 'cifar10', 'mnist' or 'folder:PATH'")


def _crops(split):
    import skimage.data  # slow to import, and not needed for a user's own images

    # One draw for the whole split, so that place k is the same crop whatever else is asked for.
    draws = torch.rand(SPLIT_SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(SPLITS.index(split)))
    load = functools.cache(lambda name: getattr(skimage.data, name)())

    def pixels(i):
        photograph = load(PHOTOGRAPHS[i % len(PHOTOGRAPHS)])
        height, width = photograph.shape[:2]
        size, down, right = draws[i].tolist()
        side = round(min(height, width) * (1 + size) / 2)  # from half of the shorter side to all of it
        top, left = round(down * (height - side)), round(right * (width - side))
        return photograph[top : top + side, left : left + side] / 255

    return _Source([i % len(PHOTOGRAPHS) for i in range(SPLIT_SIZE)], pixels, PHOTOGRAPHS)


def _faces(split):
    import skimage.data

    pixels = skimage.data.lfw_subset()[SPLITS.index(split) :: 2]  # 100 faces, then 100 non-faces, in [0, 1]
    labels = [int(i < len(pixels) // 2) for i in range(len(pixels))]
    return _Source(labels, pixels.__getitem__, ("not a face", "face"))


def _torchvision(source, split):
    from torchvision import datasets  # slow to import, and not needed for embedded images

    from rgap.artifact import outputs

    root = Path(os.environ.get("RGAP_DATA") or outputs.ROOT / "build" / "data")
    kind = datasets.CIFAR10 if source == "cifar10" else datasets.MNIST
    try:
        dataset = kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:  # no network, or a file that is not what it should be
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{source} is not in {root} and could not be downloaded ({reason}); "
            f"put {DOWNLOADS[source]} into that folder, or name another one in the environment variable RGAP_DATA"
        ) from error
    return _Source(dataset.targets, lambda i: np.asarray(dataset.data[i]) / 255, dataset.classes)


def _folder(root):
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; give folder:PATH with a folder of images")
    class_folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    samples = [(path, label) for label, folder in enumerate(class_folders) for path in _image_files(folder.rglob("*"))]
    class_names = [re.sub(r"^\d+[-_ ]*", "", p.name) for p in class_folders]
    if not samples:
        samples, class_names = [(path, 0) for path in _image_files(root.iterdir())], ["image"]
    if not samples:
        raise FileNotFoundError(f"no image in {root}; files ending in {', '.join(IMAGE_FILES)} are looked for")
    return _Source([label for _, label in samples], lambda i: _read(samples[i][0]), class_names)


def _image_files(paths):
    return sorted(p for p in paths if p.suffix.lower() in IMAGE_FILES and not p.name.startswith(".") and p.is_file())


def _read(path):
    """The pixels of an image file, upright: (H, W) or (H, W, 3) in [0, 1]."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no readable image ({error}); repair it or take it out of the folder") from error
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion to 8 would clip instead of scale
        return np.clip(np.asarray(image).astype(np.float64) / 65535, 0, 1)
    if image.mode == "F":
        raise ValueError(f"{path} holds floating-point pixels of unknown range; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")) / 255


def _fit(pixels, image_shape):
    """(H, W) or (H, W, 3) in [0, 1] to a float32 tensor of shape `image_shape`."""
    channels, height, width = image_shape
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], channels, axis=2)
    elif channels == 1:
        pixels = pixels @ LUMA_WEIGHTS[:, None]
    have_height, have_width = pixels.shape[:2]
    crop_height = min(have_height, max(1, round(have_width * height / width)))
    crop_width = min(have_width, max(1, round(have_height * width / height)))
    top, left = (have_height - crop_height) // 2, (have_width - crop_width) // 2
    image = torch.from_numpy(pixels[top : top + crop_height, left : left + crop_width].transpose(2, 0, 1).copy())
    if (crop_height, crop_width) != (height, width):  # the right size stays exactly as it is
        image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    return image.clamp(0, 1).float()


def _two_classes(class_names):
    """Label to 0 or 1, as a lookup table (number of classes,)."""
    if set(class_names) == set(CIFAR10_CLASSES):
        return torch.tensor([int(name not in CIFAR10_MACHINES) for name in class_names])
    return torch.arange(len(class_names)) % 2
