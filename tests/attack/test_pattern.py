import torch
from cases import CNN_SHAPE, batch_cnn, rand, shared_batch
from torch import nn

import rgap
from rgap.attack.pattern import batch_on_pattern, settle_signs


def test_a_unit_next_to_zero_is_turned_where_the_identities_say_so():
    model = batch_cnn(bias=True)
    images, labels, gradients = shared_batch(model)
    chain = rgap.prepare(model, CNN_SHAPE)
    layer, G = chain.layers[0], gradients[0]
    x = model[:2](images).detach().requires_grad_()
    nn.functional.cross_entropy(model[2:](x), labels).backward()
    dx, x = x.grad, x.detach()
    place = tuple(torch.nonzero(x[:1].abs() == x[:1].abs().min())[0].tolist())
    moved = x.clone()
    moved[place] = -moved[place]
    found = settle_signs(layer, G, moved, dx, doubt=1.5 * x[place].abs().item() / x.square().mean().sqrt().item())
    assert torch.equal(found > 0, x > 0) and torch.equal(settle_signs(layer, G, x, dx, doubt=0.05), x)
    linear = rgap.prepare(batch_cnn(activation=nn.Identity()), CNN_SHAPE).layers[0]
    assert settle_signs(linear, G, x, dx, doubt=0.1) is x


def test_images_are_moved_to_the_signs_that_were_recovered(monkeypatch):
    model = batch_cnn(bias=True)
    images, _, _ = shared_batch(model)
    chain = rgap.prepare(model, CNN_SHAPE)
    inputs = chain.layer_inputs(images)
    near = images + 0.02 * rand(*images.shape, seed=3)
    following = zip(chain.layers[:-1], chain.layers[1:], strict=True)
    positive = {layer.name: inputs[after.name] > 0 for layer, after in following}
    moved = batch_on_pattern(chain, near, positive)
    before, after = chain.layer_inputs(near), chain.layer_inputs(moved)
    for name in ("2", "5", "7"):  # the last one is hidden among the fully connected layers
        assert not torch.equal(before[name] > 0, inputs[name] > 0)
        assert torch.equal(after[name] > 0, inputs[name] > 0)
    assert (moved - near).abs().max() < 0.05
    smooth = rgap.prepare(batch_cnn(activation=nn.Tanh()), CNN_SHAPE)
    assert batch_on_pattern(smooth, near, positive) is near
    monkeypatch.setattr("rgap.attack.pattern.MAX_PATTERN_FLIPS", 0)
    assert torch.equal(batch_on_pattern(chain, near, positive), near)
