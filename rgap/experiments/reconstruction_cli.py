"""One attack of your choice, from the command line.

`python -m rgap.experiments.reconstruction_cli --model cnn6 --index 3` is an example.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import rgap
from rgap import artifact, data, metrics
from rgap.client.training import load_weights
from rgap.experiments import plots
from rgap.experiments.command_line import add_case, file_stem, load_case, one_line


def main(arguments: list[str] | None = None) -> int:
    """Attacks one image (or batch) and leaves pictures and the layers' table in build/reconstruction/.

    Args:
        arguments: The command line; `--help` explains it.

    Returns:
        0; or 2 after one line that says what is wrong with the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        _attack(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"reconstruction: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m rgap.experiments.reconstruction_cli", description=__doc__)
    add_case(parser)
    parser.add_argument("--index", type=int, default=0, help="place of the image in the data")
    parser.add_argument("--batch", type=int, default=1, help="how many images, from the index on, share the gradient")
    parser.add_argument("--weights", default="", help="a .safetensors or .pt file with the model's weights")
    parser.add_argument(
        "--output", type=Path, default=artifact.ROOT / "build" / "reconstruction", help="where to write"
    )
    return parser


def _attack(options):
    if options.batch < 1:
        raise ValueError(f"batch is {options.batch}; an empty batch has no gradient, give at least 1")
    model, shape, loss, classes = load_case(options)
    if options.weights:
        model = load_weights(model, options.weights)
    places = range(options.index, options.index + options.batch)
    images, labels = data.load_images(options.data, image_shape=shape, index=places, classes=classes)
    gradients = rgap.client_gradients(model, images, labels, loss=loss)
    start = time.perf_counter()
    result = rgap.reconstruct(model, gradients, image_shape=shape, loss=loss, batch_size=options.batch)
    seconds = time.perf_counter() - start

    order = metrics.match(result.images, images)
    quality = metrics.psnr_db(result.images, images[order].to(result.images))
    folder = options.output / f"{file_stem(options.model)}_{file_stem(options.data)}_{options.index}"
    for i, place in enumerate(order.tolist()):
        suffix = f"_{options.index + place}" if options.batch > 1 else ""
        _save_png(images[place], folder / f"origin{suffix}.png")
        _save_png(result.images[i], folder / f"reconstruction{suffix}.png")
        _save_png(plots.rescale(result.images[i]), folder / f"reconstruction_rescaled{suffix}.png")
    table = result.to_frame()
    artifact.write_atomically(folder / "layers.csv", lambda file: table.to_csv(file, index=False, float_format="%.6g"))

    print(f"verdict  {result.verdict}")
    if len(result.images) != options.batch:
        print(f"found    {len(result.images)} of {options.batch} images")
    print(f"labels   {result.labels.tolist()} (true: {labels[order].tolist()})")
    if len(result.images):
        print(f"PSNR     {', '.join(f'{value:.1f}' for value in quality.tolist())} dB")
    print(f"attack   {seconds:.2f} s")
    print(f"written  {folder}")


def _save_png(image, path):
    pixels = np.rint(image.double().clamp(0, 1).cpu().numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    artifact.write_atomically(path, lambda file: picture.save(file, format="PNG"))


if __name__ == "__main__":
    sys.exit(main())
