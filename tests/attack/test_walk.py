"""How many modules an attack crosses: as few as a reader must open to follow it from the gradient to the image."""

import sys
from pathlib import Path

import pytest
import torch
from cases import CNN_SHAPE, batch_cnn, shared_batch, small_cnn

import rgap
from rgap.attack.reconstruct import reconstruct

ROOT = Path(rgap.__file__).parent


def modules_crossed(call):
    """Paths of rgap's modules of which a function runs during the call."""
    files = set()

    def note(frame, event, _):
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(str(Path(file).relative_to(ROOT)) for file in files if Path(file).is_relative_to(ROOT))


@pytest.mark.parametrize(("count", "most"), [(1, 33), (3, 38)])
def test_an_attack_on_a_prepared_chain_crosses_few_modules(count, most):
    model = small_cnn() if count == 1 else batch_cnn()
    chain = rgap.prepare(model, CNN_SHAPE)
    loss, labels = ("logistic", 2) if count == 1 else ("cross_entropy", 5)
    _, _, gradients = shared_batch(model, count, labels, loss)
    options = {"loss": loss, "batch_size": count}
    options |= {"gradient_scale": 1.0}
    assert reconstruct(chain, gradients, **options).verdict == "exact"  # modules are imported, factors are made
    crossed = modules_crossed(lambda: reconstruct(chain, gradients, **options))
    assert "attack/reconstruct.py" in crossed and len(crossed) <= most, crossed


def test_the_fully_connected_layers_alone_need_no_descent():
    chain = rgap.prepare(rgap.models.fcn3(), (1, 28, 28))
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) ** 3
    gradients = rgap.client_gradients(chain.model, images, torch.tensor([0, 1, 0]))
    crossed = modules_crossed(lambda: reconstruct(chain, gradients, batch_size=3, gradient_scale=1.0))
    assert len(crossed) <= 30 and not any(name.startswith("equations/") for name in crossed), crossed
