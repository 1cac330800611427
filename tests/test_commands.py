import json
import sys
import textwrap
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from PIL import Image

import rgap
from rgap import commands
from rgap.__main__ import main, parser
from rgap.experiments import bench, samples

NETWORKS = """
    from torch import nn
    def net(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Dropout())
    def attacked(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LeakyReLU(), nn.Linear(32, 6))
    def small(classes=2):
        return nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(192, classes))
    def narrow():
        return nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
    def nearly():
        return nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(100, 1))
    ready = small()
    class Zoo:
        made = staticmethod(small)
    def table(): return nn.Sequential(nn.Linear(10, 64), nn.LeakyReLU(), nn.Linear(64, 5))
    def broken():
        raise KeyError("weights")
    def needs(something):
        return small()
    number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the working directory, and outputs beside it."""
    (tmp_path / "my_networks.py").write_text(textwrap.dedent(NETWORKS))
    (tmp_path / "my_broken_module.py").write_text("import no_such_package_here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands.artifact, "ROOT", tmp_path)
    yield tmp_path
    sys.modules.pop("my_networks", None)


def read(path):
    return np.asarray(Image.open(path)) / 255


def reconstruct(folder, *arguments):
    return main(["reconstruct", *arguments, "--output", str(folder)])


@pytest.fixture
def found(monkeypatch):
    """Puts a result in place of the attack's."""

    def given(images, labels, verdict, **more):
        values = {"images": images, "labels": labels, "verdict": verdict, "to_frame": pd.DataFrame}
        result = SimpleNamespace(**values | {"notes": (), "per_image": (), "candidates": ()} | more)
        monkeypatch.setattr(rgap, "reconstruct", lambda *_, **__: result)

    return given


# ---- Networks by name


def case(*arguments):
    return commands.load_case(parser().parse_args(["train", *arguments]))


def test_a_seed_tells_the_weights_of_any_network_and_leaves_the_generator_alone(mine):
    rgap.models.load_model("my_networks:ready")  # what a module draws on import is its own
    before = torch.get_rng_state()
    for name in ("cnn6", "my_networks:net"):
        first, again, other = (next(rgap.models.load_model(name, seed)[0].parameters()) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["my_networks:small", "my_networks:ready", "my_networks:Zoo.made"])
def test_networks_are_found_in_the_working_directory(mine, name):
    model, shape = rgap.models.load_model(name)
    assert isinstance(model, torch.nn.Sequential) and shape is None
    assert str(mine) not in sys.path


def test_the_loss_and_the_labels_follow_from_the_outputs(mine):
    model, *rest = case("--model", "my_networks:net", "--shape", "3,4,4")
    assert rest == [(3, 4, 4), "cross_entropy", None] and not model.training
    assert case("--model", "fcn3")[1:] == ((1, 28, 28), "logistic", 2)
    assert case("--model", "fcn3", "--loss", "mse")[2] == "mse"


# ---- rgap reconstruct


@pytest.mark.parametrize("model", ["cnn6", "fcn3"])
def test_leaves_three_pictures_and_a_table_and_prints_a_handful_of_lines(tmp_path, capsys, model):
    assert reconstruct(tmp_path, "--model", model, "--index", "6") == 0
    printed = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in printed]
    assert [w for w in first if w not in ("note", "others")] == ["verdict", "labels", "PSNR", "attack", "written"]
    assert printed[0].split()[1] == "exact"
    assert float(printed[2].split()[1]) > 80
    folder = tmp_path / f"{model}_seed0_logistic_embedded_6"
    names = ("original", "reconstruction", "reconstruction_rescaled")
    original, guess, rescaled = (read(folder / f"{name}.png") for name in names)
    shape = rgap.models.IMAGE_SHAPES[model]
    assert original.shape == (shape[1:] if shape[0] == 1 else (*shape[1:], 3))
    assert abs(original - guess).max() < 1.5 / 255
    assert (rescaled.min(), rescaled.max()) == (0, 1)
    assert len(pd.read_csv(folder / "layers.csv")) == {"cnn6": 7, "fcn3": 3}[model]


def test_a_folder_of_images_with_spaces_gives_a_plain_name(tmp_path):
    (tmp_path / "my images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my images" / "0.png")
    assert reconstruct(tmp_path, "--model", "fcn3", "--data", f"folder:{tmp_path}/my images") == 0
    (folder,) = tmp_path.glob("fcn3_seed0_logistic_folder-*-my-images_0")
    assert abs(read(folder / "reconstruction.png") * 255 - pixels).max() < 1.5


def test_images_of_a_batch_are_compared_each_with_its_own(tmp_path, capsys, found):
    images, labels = rgap.data.load_images(index=[5, 6])
    found(images.flip(0).double() + 1e-3, labels.flip(0), "exact")
    assert reconstruct(tmp_path, "--index", "5", "--batch", "2") == 0
    assert "PSNR     60.0, 60.0 dB" in capsys.readouterr().out
    for name in ("original", "reconstruction", "reconstruction_rescaled"):
        written = {path.name for path in (tmp_path / "cnn6_seed0_logistic_embedded_5_batch2").glob(f"{name}_?.png")}
        assert written == {f"{name}_5.png", f"{name}_6.png"}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_images_than_the_batch_are_counted_and_what_is_there_is_written(tmp_path, capsys, found, count):
    images, labels = rgap.data.load_images(index=[5])
    found(images[:count].double(), labels[:count], "rank-deficient")
    assert reconstruct(tmp_path, "--index", "5", "--batch", "2") == 0
    assert f"found    {count} of 2 images" in capsys.readouterr().out
    assert len(list((tmp_path / "cnn6_seed0_logistic_embedded_5_batch2").glob("reconstruction_?.png"))) == count


@pytest.mark.parametrize(("model", "label"), [("my_networks:attacked --shape 3,8,8", 4), ("lenet", 2)])
def test_a_network_is_attacked_with_the_loss_that_fits_its_outputs(mine, capsys, model, label):
    assert reconstruct(mine / "out", "--model", *model.split(), "--index", str(label)) == 0
    printed = capsys.readouterr().out
    assert "verdict  exact" in printed and f"labels   [{label}] (true: [{label}])" in printed
    name = model.split()[0].replace(":", "-")
    assert (mine / "out" / f"{name}_seed0_cross_entropy_embedded_{label}" / "reconstruction.png").is_file()


def test_notes_are_printed_and_every_candidate_is_kept(tmp_path, capsys, found):
    images, labels = rgap.data.load_images(index=[5])
    dark = images.double() * 0.1
    candidates = tuple(SimpleNamespace(images=image) for image in (dark, images.double()))
    found(dark, labels, "ambiguous", notes=("a twin", "another"), candidates=candidates)
    assert reconstruct(tmp_path, "--index", "5") == 0
    printed = capsys.readouterr().out
    assert "note     a twin\nnote     another\n" in printed and "others   inf dB, the other candidates" in printed
    folder = tmp_path / "cnn6_seed0_logistic_embedded_5"
    original, other = read(folder / "original.png"), read(folder / "candidate_1.png")
    assert (original == other).all() and read(folder / "comparison.png").shape == (34, 4 * 34, 3)


def test_runs_of_other_cases_go_to_other_folders(tmp_path):
    weights = tmp_path / "mine.safetensors"
    rgap.client.files.save_weights(rgap.models.fcn3(seed=3), weights, {})
    cases = ["", "--seed 1", "--loss mse", f"--weights {weights}", "--index 1"]
    for case in cases:
        assert reconstruct(tmp_path / "out", "--model", "fcn3", *case.split()) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(cases)


def test_the_gradient_in_a_file_is_attacked_without_the_truth(tmp_path, capsys):
    model, image = rgap.models.fcn3(), rgap.data.load_images(image_shape=(1, 28, 28), index=[3])[0]
    gradients = rgap.client_gradients(model, image, torch.tensor([1]))
    file = rgap.client.save_gradients(tmp_path / "shared.safetensors", gradients)
    assert reconstruct(tmp_path, "--model", "fcn3", "--gradients", str(file)) == 0
    printed = capsys.readouterr().out
    assert "true" not in printed and "PSNR" not in printed and "labels   [" in printed
    folder = tmp_path / "fcn3_seed0_logistic_shared"
    assert (folder / "reconstruction.png").is_file() and not (folder / "original.png").exists()
    stretched = read(folder / "reconstruction_rescaled.png")  # without a bias the scale of the image is open
    truth = image[0, 0].numpy()
    assert abs(stretched - (truth - truth.min()) / (truth.max() - truth.min())).max() < 2 / 255
    assert "verdict  ambiguous" in printed
    assert reconstruct(tmp_path, "--model", "fcn3", "--gradients", str(file), "--gradient-scale", "1") == 0
    assert "verdict  exact" in capsys.readouterr().out
    assert reconstruct(tmp_path, "--model", "fcn3", "--gradients", str(tmp_path / "none.pt")) == 2


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"rgap {rgap.__version__}\n"


def test_rows_of_a_table_are_audited_and_attacked_and_written_as_a_table(mine, capsys):
    case = ["--model", "my_networks:table", "--shape", "10"]
    assert main(["audit", *case, "--batch", "3", "--json", "-"]) in (0, 1, 3)
    assert json.loads(capsys.readouterr().out)["image_shape"] == [10]
    model, _ = commands.load_network(parser().parse_args(["audit", *case]))
    rows = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    gradients = rgap.client_gradients(model, rows, torch.tensor([0, 1, 2]), loss="cross_entropy")
    file = rgap.client.save_gradients(mine / "shared.safetensors", gradients)
    assert reconstruct(mine / "out", *case, "--gradients", str(file), "--batch", "3", "--loss", "cross_entropy") == 0
    (table,) = (mine / "out").rglob("rows.csv")
    found = torch.tensor(pd.read_csv(table).to_numpy())
    assert (found[:, None] - rows).abs().amax(2).amin(1).max() < 1e-3 and not list((mine / "out").rglob("*.png"))
    assert reconstruct(mine / "out", *case) == 2
    assert "there are no data of shape (10,) to load" in capsys.readouterr().err


def test_rows_of_a_table_go_in_at_every_door():
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.LeakyReLU(), torch.nn.Linear(64, 5))
    rows, labels = torch.rand(2, 10), torch.tensor([0, 1])
    gradients = rgap.client_gradients(model, rows, labels, loss="cross_entropy")
    for given in (model, rgap.prepare(model, (10,))):
        result = rgap.reconstruct(given, gradients, (10,), "cross_entropy", batch_size=2)
        assert result.images.shape == (2, 10) and "of shape (10,)" in repr(result) and "<img" in result._repr_html_()
    assert rgap.rank_analysis(model, (10,), batch_size=2).layers and rgap.largest_batch(model, (10,)).batch_size >= 2


# ---- rgap train


@pytest.mark.slow
def test_what_was_trained_is_attacked_from_its_checkpoint(tmp_path, capsys):
    assert main(["train", "--model", "fcn3", "--epochs", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["epoch", "epoch", "epoch", "written"]
    path = tmp_path / "fcn3_embedded_2_0.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "fcn3", "seed": "0", "epochs": "2", "data": "embedded"}
    arguments = ["--model", "fcn3", "--weights", str(path)]
    assert reconstruct(tmp_path / "out", *arguments) == 0
    assert float(capsys.readouterr().out.split("PSNR")[1].split()[0]) > 4
    assert reconstruct(tmp_path / "out", *arguments, "--model", "cnn6") == 2
    assert "another network's weights" in capsys.readouterr().err


# ---- rgap audit


@pytest.mark.slow
def test_the_exit_status_says_whether_it_leaks(mine, capsys):
    assert main(["audit", "--model", "my_networks:small", "--shape", "3,8,8"]) == 1
    out = capsys.readouterr().out
    assert "\nleaks: every one of 2 steps" in out and "output channels of '0'" in out
    assert json.loads((mine / "build/audit/my_networks-small.json").read_text())["model"] == "my_networks:small"
    assert f"written  {mine}/build/audit/my_networks-small.json" in out
    assert main(["audit", "--model", "my_networks:narrow", "--shape", "1,4,4"]) == 0
    assert main(["audit", "--model", "resnet18", "--json", "deep/er.json"]) == 1
    assert (mine / "deep" / "er.json").is_file()


def test_json_alone_on_standard_output(mine, capsys):
    status = main(["audit", "--model", "my_networks:small", "--shape", "3,8,8", "--batch", "2", "--json", "-"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["batch_size"] == 2 and printed.err == ""
    assert status in commands.AUDIT_STATUS.values() and not (mine / "build").exists()


# ---- rgap verify


def sample_table(count, seed=0, wrong=0):
    numbers = range(count)
    columns = {"case": [str(seed + i) for i in numbers], "verdict": "exact", "psnr_db": [70.0 + i for i in numbers]}
    return pd.DataFrame(columns | {"ok": [i >= wrong for i in numbers], "why": ""})


@pytest.fixture
def two_samples(monkeypatch):
    """Two samples in place of those of the experiments."""
    named = {"good": lambda count, seed=0: sample_table(count, seed)}
    named["bad"] = lambda count=3, seed=0: sample_table(count, seed, wrong=1)
    monkeypatch.setattr(samples, "all_samples", lambda: named)
    return named


def test_a_sample_is_run_and_written(two_samples, tmp_path, capsys):
    output = tmp_path / "verify.csv"
    assert main(["verify", "good", "--count", "4", "--seed", "5", "--output", str(output)]) == 0
    written = pd.read_csv(output)
    assert written.columns.tolist() == ["sample", *samples.SAMPLE_COLUMNS]
    assert written["case"].tolist() == [5, 6, 7, 8] and written["ok"].all()
    out = capsys.readouterr().out
    assert "good" in out and "70.0" in out and "not in order" not in out


def test_a_row_that_is_not_in_order_is_shown_and_fails_the_run(two_samples, tmp_path, capsys):
    assert main(["verify", "--output", str(tmp_path / "verify.csv")]) == 1
    assert len(pd.read_csv(tmp_path / "verify.csv")) == 203
    assert "not in order: 1 of 203" in capsys.readouterr().out
    counted = samples.sample_summary(samples.run_samples({"bad": two_samples["bad"]}, None, 0))
    assert counted.astype(str).to_numpy().tolist() == [["bad", "exact", "3", "2", "71.0"]]


def test_a_table_without_its_columns_is_refused():
    thin = {"thin": lambda count, seed: sample_table(count).drop(columns=["psnr_db", "ok"])}
    with pytest.raises(ValueError, match="sample_thin has no column psnr_db, ok"):
        samples.run_samples(thin, 2, 0)


def test_every_sample_of_the_experiments_is_found():
    assert {"batches", "chains", "conv_batches", "noisy_attacks"} <= set(samples.all_samples())


# ---- What is wrong with the arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reconstruct --model resnet", "model is 'resnet'; give cnn6, cnn6_d, cnn6_batch, fcn3, lenet"),
        ("reconstruct --data folder:/no/such", "there is no folder /no/such"),
        ("reconstruct --data imagenet", "source is 'imagenet'"),
        ("reconstruct --loss hinge", "unknown loss 'hinge'"),
        ("reconstruct --shape 3,20,20", "an image of shape (3, 20, 20) does not pass cnn6: RuntimeError: mat1"),
        ("reconstruct --index -1", "index -1 is out of range"),
        ("reconstruct --batch 0", "batch is 0; an empty batch"),
        ("reconstruct --weights no.pt", "there is no file no.pt"),
        ("reconstruct --gradient-scale 2", "gradient-scale is the factor of a gradient in a file; give --gradients"),
        ("reconstruct --output my_networks.py", "path my_networks.py/cnn6_seed0_logistic_embedded_0/layers.csv cannot"),
        ("train --model resnet", "model is 'resnet'; give cnn6"),
        ("train --epochs 0", "epochs is 0; it must be at least 1"),
        ("train --data folder:/no/such", "there is no folder /no/such"),
        ("audit --model cnn7", "model is 'cnn7'; give cnn6, cnn6_d, cnn6_batch, fcn3, lenet, resnet18, or m"),
        ("audit --model my_networks:", "model is 'my_networks:'; give cnn6"),
        ("audit --model no_such_module_here:net", "module 'no_such_module_here' cannot be imported: ModuleNotFound"),
        ("audit --model my_broken_module:n", "module 'my_broken_module' cannot be imported: ModuleNotFoundError: No "),
        ("audit --model my_networks:absent", "model is 'my_networks:absent'; my_networks has no 'absent'"),
        ("audit --model my_networks:broken", "model is 'my_networks:broken'; calling it without arguments failed: Key"),
        ("audit --model my_networks:needs", "model is 'my_networks:needs'; calling it without arguments failed: Type"),
        ("audit --model my_networks:number", "model is 'my_networks:number'; that is a int, and a torch.nn.Module is"),
        ("audit --model my_networks:small", "shape is missing; give the image shape that my_networks:small takes"),
        ("audit --shape 3,32,x", "shape is '3,32,x'; give whole numbers with commas between"),
        ("audit --shape 3,20,20", "image_shape (3, 20, 20) does not fit the network at layer '13'"),
        ("audit --shape 3,0,3", "image_shape is (3, 0, 3)"),
        ("audit --batch 0", "batch_size is 0"),
        ("verify gone", "no sample gone; there are good, bad"),
        ("audit --json my_networks.py/a.json", "path my_networks.py/a.json cannot be written: "),
        ("train --output my_networks.py", "path my_networks.py/cnn6_embedded_3_0.safetensors cannot be written"),
        ("verify good --count 0", "count is 0; it must be at least 1"),
        ("verify good --seed -1", "seed is -1; it must be an integer of at least 0"),
        ("verify good --output my_networks.py/a.csv", "path my_networks.py/a.csv cannot be written"),
        ("verify good --output .", "path . is no regular file"),
        ("bench fcn3 --against .", "there is no table ."),
        ("bench fcn3 --against my_networks.py", "my_networks.py is no table ("),
    ],
)
def test_wrong_arguments_get_one_line_and_status_two(mine, two_samples, capsys, arguments, message):
    command = arguments.split()[0]
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"rgap {command}: {message}") and printed.err.count("\n") == 1
    assert not (mine / "build").exists()


def test_options_without_a_seed_take_the_first():
    model, shape = commands.load_network(Namespace(model="fcn3", shape=None))
    assert shape == (1, 28, 28) and torch.equal(model[1].weight, rgap.models.fcn3()[1].weight)


def test_a_small_missing_share_does_not_pass_the_audit(mine, capsys):
    """The convolution lacks 6 of 162 equations: 3.7 %, as a prior makes up for."""
    case = ["audit", "--model", "my_networks:nearly", "--shape", "2,9,9", "--json", "a.json"]
    assert main(case) == 3
    assert "missing: 3.7 %, so few that a prior on images" in capsys.readouterr().out
    assert json.loads((mine / "a.json").read_text())["missing_share"] == pytest.approx(6 / 162)
    assert main([*case, "--least-deficit", "1"]) == 0
    assert main([*case, "--least-deficit", "101"]) == 2
    assert "least-deficit is 101; it must be a percentage, from 0 to 100" in capsys.readouterr().err


# ---- bench


def test_bench_writes_its_table_and_prints_how_it_compares(monkeypatch, tmp_path, capsys):
    row = {"case": "cnn6", "method": "R-GAP, prepared", "runs": 1, "median_s": 0.2, "least_s": 0.1, "ratio": 20.0}
    table = pd.DataFrame([row | {"peak_mib": 1.0, "verdict": "exact", "psnr_db": 99.0, "torch": "2"}])
    monkeypatch.setattr(bench, "bench", lambda cases, rounds: table)
    table.assign(least_s=0.3).to_csv(tmp_path / "before.csv", index=False)
    output = tmp_path / "new" / "bench.csv"
    assert main(["bench", "cnn6", "--against", str(tmp_path / "before.csv"), "--output", str(output)]) == 0
    assert pd.read_csv(output)["ratio"].tolist() == [20.0]
    printed = capsys.readouterr().out
    assert "seconds of before.csv over those of this run" in printed and "3.0" in printed
    assert main(["bench", "--against", str(tmp_path / "none.csv")]) == 2
    assert "there is no table" in capsys.readouterr().err
