import pytest
import safetensors
import safetensors.torch
import torch
from cases import rand, sequential, small_cnn
from torch import nn

from rgap.client.training import load_weights, main, save_weights, train, training
from rgap.experiments import reconstruction_cli

IMAGES, LABELS = rand(24, 3, 8, 8).float(), torch.arange(24) % 2
IMAGES[LABELS == 1] *= 0.2


def network():
    return small_cnn().float()


@pytest.mark.parametrize("options", [{}, {"optimiser": "sgd", "learning_rate": 0.5}])
def test_training_learns_and_leaves_the_model_and_the_generator_alone(options):
    model, state = network(), torch.get_rng_state()
    before = [p.clone() for p in model.parameters()]
    states = list(training(model, IMAGES, LABELS, epochs=8, batch_size=8, **options))
    losses = [loss for loss, _ in states]
    assert len(states) == 9 and losses[-1] < 0.9 * losses[0]
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.get_rng_state().equal(state) and not any(m.training for _, m in states)
    assert not states[1][1][0].weight.equal(states[2][1][0].weight)


def test_a_seed_tells_the_weights():
    first, same, other = (train(network(), IMAGES, LABELS, epochs=2, batch_size=8, seed=s) for s in (0, 0, 1))
    assert first[0].weight.equal(same[0].weight) and not first[0].weight.equal(other[0].weight)


def test_other_losses_train():
    model = sequential(nn.Flatten(), nn.Linear(192, 3)).float()
    for loss in ("cross_entropy", "mse"):
        losses = [value for value, _ in training(model, IMAGES, torch.arange(24) % 3, loss, epochs=2)]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimiser": "lion"}, "optimiser is 'lion'; it must be one of adam, sgd"),
        ({"epochs": -1}, "epochs -1, batch_size 32, learning_rate 0.001: epochs must be at least 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"optimiser": "sgd", "learning_rate": 1e30}, "the loss is .* after epoch 1; take a smaller learning_rate"),
        ({"labels": LABELS[:3]}, "there are 24 images and 3 labels"),
    ],
)
def test_bad_training_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(network(), **{"images": IMAGES, "labels": LABELS, **options})


def test_a_checkpoint_comes_back_with_its_facts(tmp_path):
    model = network()
    path = save_weights(model, tmp_path / "a" / "w.safetensors", {"model": "small", "epochs": 3})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "small", "epochs": "3"}
    other = small_cnn(seed=1).float()
    assert load_weights(other, path)[0].weight.equal(model[0].weight)
    assert not other[0].weight.equal(model[0].weight)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_weights(other, str(tmp_path / "w.pt"))[0].weight.equal(model[0].weight)


def state_with(**changes):
    return network().state_dict() | changes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"no such thing", "cannot be read as a checkpoint"),
        ("w.pt", b"no such thing", "cannot be read as a checkpoint"),
        ("w.pt", b"", "cannot be read as a checkpoint"),
        ("w.bin", b"", "is no .safetensors, .pt or .pth file"),
        ("w.pt", 3, "holds a int; it must hold a state dict"),
        ("w.pt", {"x": torch.ones(1)}, r"missing \['0.weight', '2.weight', '5.weight'\], unknown \['x'\]"),
        ("w.safetensors", {"x": torch.ones(1)}, "another network's weights"),
        ("w.pt", state_with(**{"0.weight": torch.ones(2)}), r"has '0.weight' of shape \(2,\); the network's is"),
        ("w.pt", state_with(**{"0.weight": 3}), r"has '0.weight' of shape \(\)"),
        ("w.pt", state_with(**{"5.weight": torch.full((1, 160), torch.nan)}), "NaN or infinity in '5.weight'"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith(".pt"):
        torch.save(content, path)
    else:
        safetensors.torch.save_file(content, path)
    with pytest.raises(ValueError, match=message):
        load_weights(network(), path)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save(network(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_weights(network(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(network(), tmp_path / "none.pt")


def test_the_command_line_trains_and_the_attack_takes_what_it_wrote(tmp_path, capsys):
    assert main(["--model", "fcn3", "--epochs", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["epoch", "epoch", "epoch", "written"]
    path = tmp_path / "fcn3_embedded_2_0.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "fcn3", "seed": "0", "epochs": "2", "data": "embedded"}
    arguments = ["--model", "fcn3", "--weights", str(path), "--output", str(tmp_path / "out")]
    assert reconstruction_cli.main(arguments) == 0
    assert float(capsys.readouterr().out.split("PSNR")[1].split()[0]) > 4
    assert reconstruction_cli.main([*arguments, "--model", "cnn6"]) == 2
    assert "another network's weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "model is 'resnet'; give cnn6"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--data", "folder:/no/such"], "there is no folder /no/such"),
    ],
)
def test_bad_arguments_get_one_line_and_exit_with_two(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"train: {message}")
