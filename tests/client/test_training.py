import pytest
import torch
from cases import rand, sequential, small_cnn
from torch import nn

from rgap.client.training import training

IMAGES, LABELS = rand(24, 3, 8, 8).float(), torch.arange(24) % 2
IMAGES[LABELS == 1] *= 0.2


def train(*args, **options):
    """The last network of a training."""
    *_, (_, trained) = training(*args, **options)
    return trained


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
        ({"epochs": -1}, "epochs is -1; it must be an integer of at least 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"optimiser": "sgd", "learning_rate": 1e30}, "the loss is .* after epoch 1; take a smaller learning_rate"),
        ({"labels": LABELS[:3]}, r"images are \(24, 3, 8, 8\) and labels 3"),
    ],
)
def test_bad_training_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(network(), **{"images": IMAGES, "labels": LABELS, **options})
