"""The commands of `python -m rgap` that compute: each takes the parsed arguments and returns the exit status."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import rgap
from rgap import artifact, data, metrics, models
from rgap.arguments import check_count
from rgap.artifact.outputs import check_writable, save_csv
from rgap.client import check_loss
from rgap.client.files import load_gradients, load_weights, save_weights
from rgap.client.training import training
from rgap.ranks.audit import audit as audited
from rgap.results.display import rescale, to_pixels

AUDIT_STATUS = {"stops": 0, "leaks": 1, "unknown": 3}  # outcome -> exit status; 2 is for wrong arguments


def reconstruct(options: argparse.Namespace) -> int:
    """Attacks one image or batch, or the gradient in a file, writes pictures and the layers' table, and prints notes.

    Where the images are known it prints how close the result is. Rows of a table are written as one.
    """
    model, shape, loss, classes = load_case(options)
    if options.weights:
        model = load_weights(model, options.weights)
    if options.batch < (0 if options.gradients else 1):
        raise ValueError(f"batch is {options.batch}; an empty batch has no gradient, give at least 1")
    if options.gradient_scale is not None and not options.gradients:
        raise ValueError("gradient-scale is the factor of a gradient in a file; give --gradients, or leave it out")
    folder = options.output / _case_name(options, loss)
    images, labels, scale = None, None, options.gradient_scale
    if options.gradients:
        gradients = load_gradients(options.gradients)
    elif shape is not None and len(shape) != 3:
        raise ValueError(f"there are no data of shape {shape} to load; give the file of a gradient, --gradients")
    else:
        places = range(options.index, options.index + options.batch)
        images, labels = data.load_images(options.data, image_shape=shape, index=places, classes=classes)
        gradients, scale = rgap.client_gradients(model, images, labels, loss=loss), 1.0  # the client's loss is a mean
    check_writable(folder / "layers.csv")
    start = time.perf_counter()
    result = rgap.reconstruct(
        model, gradients, image_shape=shape, loss=loss, batch_size=options.batch or None, gradient_scale=scale
    )
    seconds = time.perf_counter() - start
    order = None if images is None else metrics.match(result.images, images)
    if result.images.ndim == 2:  # rows of a table
        save_csv(pd.DataFrame(result.images.cpu().numpy()), folder / "rows.csv")
    else:
        _write_pictures(result, images, order, options, folder)
    save_csv(result.to_frame(), folder / "layers.csv")

    print(f"verdict  {result.verdict}")
    if images is not None and len(result.images) != options.batch:
        print(f"found    {len(result.images)} of {options.batch} images")
    print(f"labels   {result.labels.tolist()}" + ("" if order is None else f" (true: {labels[order].tolist()})"))
    if order is not None and len(result.images):
        quality = metrics.psnr_db(result.images, images[order].to(result.images)).tolist()
        print(f"PSNR     {', '.join(f'{value:.1f}' for value in quality)} dB")
        if len(result.images) == 1 and len(result.candidates) > 1:
            others = [metrics.psnr_db(c.images, images[order].to(c.images)).item() for c in result.candidates[1:]]
            print(f"others   {', '.join(f'{value:.1f}' for value in others)} dB, the other candidates")
    for note in result.notes:
        print(f"note     {note}")
    print(f"attack   {seconds:.2f} s")
    print(f"written  {folder}")
    return 0


def _case_name(options: argparse.Namespace, loss: str) -> str:
    """A folder's name by all that decides a result, so that runs do not overwrite each other."""
    parts = [options.model, f"seed{options.seed}", loss]
    parts += [f"weights-{Path(options.weights).stem}"] if options.weights else []
    parts += [Path(options.gradients).stem] if options.gradients else [options.data, options.index]
    parts += [f"batch{options.batch}"] if options.batch != 1 else []
    return "_".join(_file_stem(str(part)) for part in parts)


def _write_pictures(
    result: rgap.Reconstruction, images: Tensor | None, order: Tensor | None, options: argparse.Namespace, folder: Path
) -> None:
    """Each image found, its original where that is known, every candidate, and all of them side by side."""
    rows = []
    for i, found in enumerate(result.images):
        suffix = "" if len(result.images) == 1 and options.batch == 1 else f"_{options.index + i}"
        row = [found, rescale(found)]
        if order is not None:
            suffix = suffix and f"_{options.index + int(order[i])}"
            row.insert(0, images[order[i]])
            _save_png(row[0], folder / f"original{suffix}.png")
        _save_png(found, folder / f"reconstruction{suffix}.png")
        _save_png(rescale(found), folder / f"reconstruction_rescaled{suffix}.png")
        candidates = result.per_image[i][1] if i < len(result.per_image) else result.candidates
        others = [c.images[0] for c in candidates if len(c.images) == 1][1:]
        for place, other in enumerate(others, 1):
            _save_png(other, folder / f"candidate{suffix}_{place}.png")
        rows.append([x.cpu().double() for x in (*row, *others)])
    if rows:
        _save_png(_side_by_side(rows), folder / "comparison.png")


def _side_by_side(rows: list[list[Tensor]]) -> Tensor:
    """Images (C, H, W) in a grid with white lines between, (C, H', W')."""
    frame = [[F.pad(x, (1, 1, 1, 1), value=1.0) for x in row] for row in rows]
    widest = max(map(len, frame))
    blank = torch.ones_like(frame[0][0])
    return torch.cat([torch.cat([*row, *[blank] * (widest - len(row))], dim=2) for row in frame], dim=1)


def train(options: argparse.Namespace) -> int:
    """Trains a network, on two classes if it has one output, and writes a checkpoint."""
    if options.epochs < 1:
        raise ValueError(f"epochs is {options.epochs}; it must be at least 1")
    model, shape, loss, classes = load_case(options)
    images, labels = data.load_images(options.data, None, shape, split="train", classes=classes)
    name = f"{_file_stem(options.model)}_{_file_stem(options.data)}_{options.epochs}_{options.seed}.safetensors"
    check_writable(options.output / name)
    course = training(model, images, labels, loss, epochs=options.epochs, seed=options.seed)
    for epoch, (value, trained) in enumerate(course):
        with torch.no_grad():
            outputs = torch.cat([trained(x) for x in images.split(256)])
        found = (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
        print(f"epoch {epoch}  loss {value:.4f}  right {(found == labels).double().mean():.1%}")
    facts = {key: getattr(options, key) for key in ("model", "seed", "epochs", "data")}
    print(f"written  {save_weights(trained, options.output / name, facts)}")
    return 0


def audit(options: argparse.Namespace) -> int:
    """Prints the audit of a network and writes it as JSON; the exit status tells whether it leaks.

    Where it stops for want of fewer equations than `least_deficit` per cent, the status is that of "unknown".
    """
    if not 0 <= options.least_deficit <= 100:
        raise ValueError(f"least-deficit is {options.least_deficit:g}; it must be a percentage, from 0 to 100")
    model, shape = load_network(options)
    least = options.least_deficit / 100
    result = audited(model, shape, options.batch, least_share=least)
    text = json.dumps({"model": options.model} | result.to_dict(), indent=2, allow_nan=False) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
    else:
        path = Path(options.json or artifact.ROOT / "build" / "audit" / f"{_file_stem(options.model)}.json")
        artifact.write_atomically(path, lambda file: file.write(text.encode()))
        with pd.option_context("display.width", None, "display.max_rows", None):
            print(result.table().to_string(index=False, na_rep="?"))
        print("", *result.sentences, f"written  {path}", sep="\n")
    outcome = result.exposure.outcome
    return AUDIT_STATUS["unknown" if outcome == "stops" and result.exposure.missing_share < least else outcome]


def verify(options: argparse.Namespace) -> int:
    """Runs samples of random attacks, writes their rows, and fails if any is not in order."""
    if options.count is not None and options.count < 1:
        raise ValueError(f"count is {options.count}; it must be at least 1")
    from rgap.experiments import samples  # the extra `artifact`

    known = samples.all_samples()
    if unknown := set(options.only) - set(known):
        raise ValueError(f"no sample {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = {name: sample for name, sample in known.items() if not options.only or name in options.only}
    check_count("seed", options.seed, 0)
    check_writable(options.output)
    table = samples.run_samples(chosen, options.count, options.seed)
    save_csv(table, options.output)
    print(samples.sample_summary(table).to_string(index=False))
    wrong = table[~table["ok"]]
    if len(wrong):
        print(f"\nnot in order: {len(wrong)} of {len(table)}")
        print(wrong[["sample", *samples.SAMPLE_COLUMNS]].to_string(index=False))
    print(f"\nwritten  {options.output}")
    return int(len(wrong) > 0)


def bench(options: argparse.Namespace) -> int:
    """Times attacks and audits, writes the table, and prints it and how it compares with an earlier one."""
    from rgap.experiments import bench as benchmark

    if not options.against.is_file():
        raise FileNotFoundError(f"there is no table {options.against}; give --against a table of another run")
    earlier = benchmark.earlier_times(options.against)
    check_writable(options.output)
    table = benchmark.bench(options.cases, options.rounds)
    earlier = benchmark.compared(table, earlier)
    save_csv(table, options.output)
    with pd.option_context("display.width", None, "display.max_rows", None):
        digits = dict.fromkeys(("median_s", "least_s", "before_s"), 4) | {"ratio": 1, "peak_mib": 0, "psnr_db": 1}
        digits |= {"speedup": 2, "floor_gflop": 2, "floor_share": 2, "gemm_gflops": 0}
        print(table.drop(columns="torch").round(digits).to_string(index=False, na_rep="-"))
        print(f"\nseconds of {options.against.name} over those of this run:")
        print(earlier.round(digits).to_string(index=False) if len(earlier) else "it has none of these cases")
    print(f"\nwritten  {options.output}")
    return 0


def load_network(options: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """The network that `model` names, with weights of `seed` (0 if there is none), and the shape of its images.

    Refuses a `shape` that is malformed, or missing where the network's is unknown.
    """
    model, known = models.load_model(options.model, getattr(options, "seed", 0))
    if options.shape and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", options.shape):
        raise ValueError(f"shape is {options.shape!r}; give whole numbers with commas between, e.g. 3,224,224")
    if not options.shape and known is None:
        raise ValueError(f"shape is missing; give the image shape that {options.model} takes, e.g. 3,224,224")
    return model, tuple(int(number) for number in options.shape.split(",")) if options.shape else known


def load_case(options: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...], str, int | None]:
    """The network in eval mode, the shape of an image, the loss, and the `classes` for `rgap.data.load_images`.

    Unless it is given, the loss is logistic for one output and cross-entropy for several; `classes` is 2 for one output
    and None for several. Refuses an unknown loss, and a network that does not take images of this shape.
    """
    model, shape = load_network(options)
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *shape)).flatten(1).shape[1]
    except RuntimeError as error:
        raise ValueError(f"an image of shape {shape} does not pass {options.model}: RuntimeError: {error}") from error
    loss = options.loss or ("logistic" if outputs == 1 else "cross_entropy")
    check_loss(loss)
    return model, shape, loss, 2 if outputs == 1 else None


def _file_stem(text: str) -> str:
    """A path or `module:function` as a plain file name: every other character becomes a dash."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def _save_png(image: Tensor, path: Path) -> None:
    picture = Image.fromarray(to_pixels(image))
    artifact.write_atomically(path, lambda file: picture.save(file, format="PNG"))
