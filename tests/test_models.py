import pytest
import torch
from torch import nn

from rgap import models

BUILDERS = [models.cnn6, models.cnn6_d, models.fcn3]


def shapes(model):
    return [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("builder", BUILDERS)
def test_models_are_flat_bias_free_float32_in_eval_mode_with_one_output(builder):
    model = builder()
    assert isinstance(model, nn.Sequential) and not model.training
    assert all(not list(module.children()) for module in model)
    assert all(name.endswith("weight") and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert all(module.negative_slope == 0.2 for module in model if isinstance(module, nn.LeakyReLU))
    assert isinstance(model[-1], nn.Linear)
    assert model(torch.rand(2, *models.IMAGE_SHAPES[builder.__name__])).shape == (2, 1)


@pytest.mark.parametrize(("builder", "width"), [(models.cnn6, 36), (models.cnn6_d, 20)])
def test_cnn6_has_the_layers_of_the_paper(builder, width):
    expected = [(12, 3, 4, 4), (width, 12, 3, 3), (36, width, 3, 3), (36, 36, 3, 3), (64, 36, 3, 3), (128, 64, 3, 3)]
    model = builder()
    assert shapes(model) == [*expected, (1, 3200)]
    convolutions = [module for module in model if isinstance(module, nn.Conv2d)]
    assert [c.stride for c in convolutions] == [(2, 2), (2, 2), (1, 1), (1, 1), (2, 2), (1, 1)]
    assert [c.padding for c in convolutions] == [(2, 2)] + [(1, 1)] * 5


def test_widths_are_arguments():
    assert shapes(models.cnn6(width=24))[1:3] == [(24, 12, 3, 3), (36, 24, 3, 3)]
    assert shapes(models.fcn3()) == [(1000, 784), (100, 1000), (1, 100)]
    assert shapes(models.fcn3(widths=(30, 20, 10))) == [(30, 784), (20, 30), (10, 20), (1, 10)]


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_seed_alone_decides_the_weights_and_the_global_generator_stays(builder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (torch.cat([p.flatten() for p in builder(seed).parameters()]) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert first.equal(again) and not first.equal(other)


def test_the_weights_are_those_of_torchs_default_initialisation():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = nn.Conv2d(3, 12, 4, 2, 2, bias=False).weight
    assert models.cnn6(seed=3)[0].weight.equal(expected)


def test_lenet_is_bias_free_with_the_activation_and_classes_asked_for():
    model = models.lenet()
    assert shapes(model) == [(12, 3, 5, 5), (12, 12, 5, 5), (12, 12, 5, 5), (10, 768)] and not model.training
    assert [c.stride for c in model if isinstance(c, nn.Conv2d)] == [(2, 2), (2, 2), (1, 1)]
    assert sum(isinstance(module, nn.Sigmoid) for module in model) == 3
    assert model(torch.rand(2, *models.ANALYSIS_SHAPES["lenet"])).shape == (2, 10)
    leaky = models.lenet(seed=1, classes=1, activation=lambda: nn.LeakyReLU(0.2))
    assert leaky(torch.rand(2, 3, 32, 32)).shape == (2, 1)
    assert leaky[0].weight.equal(models.lenet(seed=1)[0].weight) and not leaky[0].weight.equal(model[0].weight)


def test_resnet18_without_skips_is_the_chain_of_its_own_convolutions():
    whole = models.resnet18(seed=3)
    cut = models.resnet18(seed=3, cut=("layer1.0", "layer3.0"))
    x = torch.rand(2, *models.ANALYSIS_SHAPES["resnet18"])
    assert whole(x).shape == cut(x).shape == (2, 10) and not cut.training
    assert whole.layer1[1](torch.ones(1, 64, 8, 8)).equal(cut.layer1[1](torch.ones(1, 64, 8, 8)))
    features = torch.rand(1, 64, 8, 8)
    block = whole.layer1[0]
    chain = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(features)))))
    assert cut.layer1[0](features).equal(chain.relu())
    assert block(features).equal((chain + features).relu())
    missing = set(whole.state_dict()) - set(cut.state_dict())
    assert missing and all("layer3.0.downsample" in name for name in missing)
    assert models.resnet18(cut=models.RESNET18_BLOCKS, classes=3)(x).shape == (2, 3)


def test_resnet18_refuses_a_block_that_it_has_not():
    with pytest.raises(ValueError, match=r"cut has \['layer5.0'\]; the blocks are layer1.0, layer1.1"):
        models.resnet18(cut=("layer5.0", "layer1.0"))
