"""The command line: `python -m rgap COMMAND`, or `rgap COMMAND` where the package is installed; `--help` says more."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

# Nothing here imports torch: `rgap notebook` starts once for every notebook, and torch takes seconds to import.
import rgap
from rgap import artifact

MODELS = ("cnn6", "cnn6_d", "cnn6_batch", "fcn3", "lenet")
LOSSES = ("logistic", "cross_entropy", "mse")
BUILD = artifact.ROOT / "build"

AUDIT = """What a network gives away, by the ranks of its layers' linear equations; no data, no attack, seconds.

Prints a row for every counted step, the outcome in words, and changes that would stop the leak; the same as JSON
goes to build/audit/. What it says is no guarantee."""
AUDIT_END = """exit status, so that it can stand in a pipeline:
  0  stops: the linear equations do not determine the image; at least --least-deficit of a step's are missing
  1  leaks: they do
  2  an argument is wrong; one line on standard error says which
  3  unknown: neither is shown, or so few equations are missing that a prior on images makes up for them

examples:
  rgap audit --model cnn6
  rgap audit --model torchvision.models:resnet18 --shape 3,224,224
  rgap audit --model my_networks:small --shape 3,32,32 --batch 8 --json -"""

RECONSTRUCT = """Attacks the gradient of one image, or of a batch, and compares the result with the truth.

Pictures and the layers' table go to a folder in build/reconstruction/ that is named by the case; the verdict is found
without the truth. With --gradients the gradient in a file is attacked, as a client has shared it."""
RECONSTRUCT_END = """examples:
  rgap reconstruct --model cnn6 --index 3
  rgap reconstruct --model cnn6_batch --batch 4
  rgap reconstruct --model cnn6_batch --batch 0 --gradients shared.safetensors
  rgap reconstruct --model my_networks:small --shape 3,32,32 --data folder:photos --weights trained.safetensors"""

TRAIN = """Trains a network for a few epochs, on two classes where it has one output, and leaves a checkpoint."""
TRAIN_END = """example, with an attack on what was trained:
  rgap train --model fcn3 --data mnist --epochs 2
  rgap reconstruct --model fcn3 --data mnist --weights build/weights/fcn3_mnist_2_0.safetensors"""

VERIFY = """Attacks random networks, batches and noisy gradients, and judges every result against the truth.

Writes build/verify.csv, prints a summary and every row that is not in order."""
VERIFY_END = """exit status: 0 where every row is in order, 1 where one is not, 2 where an argument is wrong.

example:
  rgap verify chains --count 50 --seed 1"""

BENCH = """Measures CPU seconds, memory and quality of attacks and audits, in float64 and with one thread.

Writes build/bench.csv and compares it with an earlier table; the ratio to one forward and backward pass of the same
network carries over to other machines, seconds do not."""
BENCH_END = """examples:
  rgap bench
  rgap bench cnn6 fcn3-B5 --rounds 9 --against build/before.csv"""

NOTEBOOK = """Runs a notebook strictly: an unknown parameter, an error, or an absent figure fails and leaves no target.

With a TARGET a copy runs, by papermill; without one the outputs that SOURCE itself carries are refreshed."""
NOTEBOOK_END = """exit status: 0, 1 where the notebook fails, 2 where an argument is wrong.

example:
  rgap notebook notebooks/01_reconstruction.ipynb build/01.ipynb -p seeds [0]"""

NOTEBOOKS = """Runs notebooks side by side, the longest first, goes on after one that fails, and shows how long is left.

`run` writes executed copies --into a folder; `refresh` runs notebooks where they lie and replaces their outputs, one
after another; `test` runs them by nbval against what they print."""
NOTEBOOKS_END = """exit status: 0, 1 where a notebook fails, 2 where an argument is wrong.

example:
  rgap notebooks run notebooks/0[1-3]_*.ipynb --into build/default --jobs 2"""

REPORT = """Writes every notebook, figure, table and claim as web pages to build/report/.

With --claims it prints instead how the last run's figures and tables compare with the committed ones, and the claims
that it measured; 1 is the exit status where one differs or fails. With --readme it writes the tables of
claims in README.md and docs/claims.md."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage is left to `--help`."""

    def error(self, message: str) -> None:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command, given as the command line without the program's name, and returns its exit status.

    `--help` of the command explains the status: 0 for success, 2 after one line that says what is wrong with the
    arguments, 130 after an interruption.
    """
    options = parser().parse_args(arguments)
    try:
        home = "rgap.artifact.commands" if options.command in ("notebook", "notebooks", "report") else "rgap.commands"
        return getattr(importlib.import_module(home), options.command)(options)
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename and error.strerror
        status, trouble = 2, " ".join((f"{error.filename}: {error.strerror}" if named else str(error)).split())
    except ModuleNotFoundError as error:
        status, trouble = 2, f"{error.name} is not installed; {artifact.HOW}"
    except KeyboardInterrupt:
        status, trouble = 130, "interrupted"
    print(f"rgap {options.command}: {trouble}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    about = "R-GAP: what a shared gradient gives away. `python -m rgap` is the same."
    top = OneLineParser(prog="rgap", description=about)
    top.add_argument("--version", action="version", version=f"rgap {rgap.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, description: str, epilog: str = "") -> Callable[..., argparse.Action]:
        texts = {"help": description.partition("\n")[0], "description": description, "epilog": epilog}
        made = commands.add_parser(name, **texts, formatter_class=argparse.RawDescriptionHelpFormatter)
        return made.add_argument

    _add_attacks(command)
    _add_samples(command)
    _add_artifact(command)
    return top


def _add_attacks(command: Callable) -> None:
    add = command("reconstruct", RECONSTRUCT, RECONSTRUCT_END)
    _add_case(add)
    add("--index", type=int, default=0, help="place of the image in the data")
    about = "images, from the index on, that share the gradient; with --gradients 0 finds their number"
    add("--batch", type=int, default=1, help=about)
    add("--gradients", default="", help="a .safetensors or .pt file with a gradient to attack")
    about = "factor of the gradient in the file; 1 is the mean loss, by default it is estimated"
    add("--gradient-scale", type=float, help=about)
    add("--weights", default="", help="a .safetensors or .pt file with the model's weights")
    add("--output", type=Path, default=BUILD / "reconstruction", help="folder to write to")

    add = command("train", TRAIN, TRAIN_END)
    _add_case(add)
    add("--epochs", type=int, default=3, help="passes over the images")
    add("--output", type=Path, default=BUILD / "weights", help="folder to write to")

    add = command("audit", AUDIT, AUDIT_END)
    _add_model(add, (*MODELS, "resnet18"))
    add("--batch", type=int, default=1, help="images behind one gradient")
    about = "share of a step's equations that must be missing for status 0, by default 10"
    add("--least-deficit", type=float, default=10.0, metavar="PERCENT", help=about)
    add("--json", help="file for the JSON, or - for the JSON alone on standard output")


def _add_samples(command: Callable) -> None:
    add = command("verify", VERIFY, VERIFY_END)
    add("only", nargs="*", metavar="SAMPLE", help="samples to run; all by default")
    add("--count", type=int, help="cases of each sample; 200 unless the sample says otherwise")
    add("--seed", type=int, default=0, help="seed of the cases")
    add("--output", type=Path, default=BUILD / "verify.csv", help="file to write")

    add = command("bench", BENCH, BENCH_END)
    add("cases", nargs="*", metavar="CASE", help="cases to run; by default all but the largest")
    add("--rounds", type=int, default=5, help="runs of each case, in turn with the others; one where it is slow")
    about = "table to compare with: of another run, or figures/04_cost_times.csv"
    add("--against", type=Path, default=artifact.ROOT / "figures" / "04_cost_times.csv", help=about)
    add("--output", type=Path, default=BUILD / "bench.csv", help="file to write")


def _add_artifact(command: Callable) -> None:
    one = command("notebook", NOTEBOOK, NOTEBOOK_END)
    one("source", type=Path, metavar="SOURCE", help="the notebook")
    one("target", type=Path, metavar="TARGET", nargs="?", help="where the executed copy goes")
    pairs = {"nargs": 2, "action": "append", "default": []}
    one("-p", "--parameter", **pairs, metavar=("NAME", "VALUE"), help="a parameter, written as YAML")
    several = command("notebooks", NOTEBOOKS, NOTEBOOKS_END)
    several("action", choices=("run", "refresh", "test"), metavar="run|refresh|test")
    several("sources", type=Path, nargs="+", metavar="SOURCE", help="the notebooks")
    several("--into", type=Path, default=BUILD, help="folder of the executed copies and of what is said")
    several("--jobs", type=int, help="how many run at a time; by default one a core")
    for add in (one, several):
        add("-f", "--file", type=Path, help="YAML file of parameters, one section per notebook")
        add("-o", "--offer", **pairs, metavar=("NAME", "TEXT"), help="a text for notebooks that have this parameter")

    add = command("report", REPORT)
    about = "compare with the committed figures, print the claims and what is wrong with the run"
    add("--claims", action="store_true", help=about)
    about = "write the tables of claims in README.md and docs/claims.md from the committed run"
    add("--readme", action="store_true", help=about)


def _add_model(add: Callable, known: tuple[str, ...]) -> None:
    add("--model", default="cnn6", help=f"{', '.join(known)}, or module:function (default: cnn6)")
    add("--shape", help="shape of one image, e.g. 3,224,224; known for the models of this package")


def _add_case(add: Callable) -> None:
    """The arguments that `rgap.commands.load_case` reads, and the data that the network sees."""
    _add_model(add, MODELS)
    add("--loss", help=f"{', '.join(LOSSES)}; by default the one that fits the number of outputs")
    add("--seed", type=int, default=0, help="seed of the model's weights")
    add("--data", default="embedded", help="embedded, cifar10, mnist or folder:PATH")


if __name__ == "__main__":
    sys.exit(main())
