from argparse import ArgumentParser

import pytest
import torch

from rgap.experiments import command_line


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "command_line_net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Dropout())\n"
    )
    monkeypatch.chdir(tmp_path)
    return "command_line_net:net"


def parse(*arguments):
    parser = ArgumentParser()
    command_line.add_case(parser)
    return parser.parse_args(arguments)


def test_a_seed_tells_the_weights_of_any_network_and_leaves_the_generator_alone(own):
    before = torch.get_rng_state()
    for name in ("cnn6", own):
        first, again, other = (next(command_line.load_model(name, seed)[0].parameters()) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_and_the_labels_follow_from_the_outputs(own):
    model, *rest = command_line.load_case(parse("--model", own, "--shape", "3,4,4"))
    assert rest == [(3, 4, 4), "cross_entropy", None] and not model.training
    assert command_line.load_case(parse("--model", "fcn3"))[1:] == ((1, 28, 28), "logistic", 2)
    assert command_line.load_case(parse("--model", "fcn3", "--loss", "mse"))[2] == "mse"


def test_a_missing_shape_is_asked_for(own):
    with pytest.raises(ValueError, match="shape is missing; give the image shape that command_line_net:net takes"):
        command_line.load_case(parse("--model", own))
