import pytest
import torch
from cases import randn

from rgap import client
from rgap.experiments.defence_menu import DEFENCES, defended, noise_of, strengths_of


def test_defences_are_those_of_the_client():
    shared = [randn(40)]
    assert torch.equal(defended(shared, "prune", 0.5)[0], client.prune(shared, 0.5)[0])
    assert torch.equal(defended(shared, "clip_and_noise", 0.1)[0], client.clip_and_noise(shared, 1.0, 0.1)[0])
    assert defended(shared, "gaussian_noise", 0) is shared
    for call in (lambda: defended(shared, "hope", 1), lambda: strengths_of("hope")):
        with pytest.raises(ValueError, match="defence is 'hope'; it must be one of gaussian_noise, clip_and_noise"):
            call()


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_strength_on_the_menu_can_be_had_and_only_the_first_changes_nothing(defence):
    shared = [randn(2000).float()]
    for strength in strengths_of(defence):
        changed = not torch.equal(defended(shared, defence, strength)[0], shared[0])
        small = isinstance(strength, float) and strength < 1e-7  # below what float32 resolves
        assert changed == (strength != strengths_of(defence)[0]) or small


def test_an_attacker_expects_the_noise_that_it_knows_of():
    assert noise_of("gaussian_noise", 1e-5) == 1e-5
    assert noise_of("gaussian_noise", 0) is None and noise_of("quantise", "int8") is None
