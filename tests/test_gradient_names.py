"""Gradients as users bring them: names with prefixes, vectors, lists with buffers, arrays, frozen parameters."""

import re

import numpy as np
import pytest
import torch
from cases import rand, sequential
from torch import nn

import rgap
from rgap import baselines, client
from rgap.shared_gradient import receive
from rgap.shared_gradient.names import gradients_by_name

SHAPE = (1, 5, 5)


def network():
    model = sequential(nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(96, 1))
    return model.eval()


MODEL, IMAGE, LABEL = network(), rand(1, *SHAPE), torch.tensor([1])
GRADIENTS = client.client_gradients(MODEL, IMAGE, LABEL)
NAMED = dict(zip(dict(MODEL.named_parameters()), GRADIENTS, strict=True))
CHAIN = rgap.prepare(MODEL, SHAPE)
BUFFERS = {name: b.clone() for name, b in MODEL.named_buffers()}
STATE = {name: NAMED.get(name, BUFFERS.get(name)) for name in MODEL.state_dict()}

TAKEN = {
    "names": NAMED,
    "wrapped by DataParallel": {f"module.{name}": g for name, g in NAMED.items()},
    "wrapped by Opacus": {f"_module.{name}": g for name, g in NAMED.items()},
    "compiled": {f"_orig_mod.{name}": g for name, g in NAMED.items()},
    "compiled in part": {name.replace(".", "._orig_mod."): g for name, g in NAMED.items()},
    "wrapped twice": {f"module._orig_mod.{name}": g for name, g in NAMED.items()},
    "part of a larger model": {f"client.backbone.{name}": g for name, g in NAMED.items()},
    "with buffers": STATE,
    "with buffers and prefix": {f"module.{name}": g for name, g in STATE.items()},
    "list of the state": list(STATE.values()),
    "list of the state without counters": [g for name, g in STATE.items() if "num_batches" not in name],
    "numpy arrays": [g.numpy() for g in GRADIENTS],
    "numpy arrays by name": {name: np.asfortranarray(g.numpy()) for name, g in NAMED.items()},
    "reversed views": [torch.from_numpy(g.numpy()[::-1].copy()[::-1].copy()) for g in GRADIENTS],
    "a generator": (g for g in GRADIENTS),
    "values": NAMED.values(),
    "tracked": [g.clone().requires_grad_() for g in GRADIENTS],
    "parameters": [nn.Parameter(g) for g in GRADIENTS],
    "by place": dict(enumerate(GRADIENTS)),
    "unflattened": client.unflatten(MODEL, nn.utils.parameters_to_vector(GRADIENTS)),
}


@pytest.mark.parametrize("form", TAKEN)
def test_every_form_without_a_choice_is_taken(form):
    found = receive(CHAIN, TAKEN[form])
    assert list(found.gradients) == list(NAMED)
    assert all(g.equal(NAMED[name]) for name, g in found.gradients.items()) and found.absent == ()


def test_the_attack_and_the_optimisers_take_them():
    for form in ("wrapped by Opacus", "list of the state", "numpy arrays"):
        assert rgap.reconstruct(MODEL, TAKEN[form], SHAPE).verdict == "exact"
        assert baselines.dlg(MODEL, TAKEN[form], SHAPE, steps=1).images.shape == (1, *SHAPE)


VECTOR = nn.utils.parameters_to_vector(GRADIENTS)
REFUSED = {
    "a vector": (VECTOR, "one vector of all 139 entries; take it apart by rgap.client.unflatten(model, vector)"),
    "a vector in a list": ([VECTOR], "1 gradients for 6 parameters: gradients are one vector of all 139 entries; take"),
    "another vector": (VECTOR[1:], "one tensor of shape (138,), and the parameters have 139 entries; give a list"),
    "a set": (set(GRADIENTS), "gradients are a set; a set has no order; give a list"),
    "a frozen set": (frozenset(GRADIENTS), "gradients are a frozenset; a set has no order"),
    "names in a set": (NAMED.keys(), "has no order"),
    "two prefixes": (
        {f"{'ab'[i % 2]}.{name}": g for i, (name, g) in enumerate(NAMED.items())},
        "gradients do not fit the parameters: missing ['0.weight'",
    ),
    "one name twice": (NAMED | {"module.0.weight": GRADIENTS[0]}, "unknown ['module.0.weight']"),
    "a foreign name": (NAMED | {"head.weight": GRADIENTS[0]}, "unknown ['head.weight']"),
    "a state in another order": (
        list(reversed(STATE.values())),
        "9 gradients for 6 parameters, as many as parameters and buffers together, but '0.weight' has another shape",
    ),
    "sparse": ([GRADIENTS[0].to_sparse(), *GRADIENTS[1:]], "'0.weight' is torch.sparse_coo; it must be a dense tensor"),
    "quantised": (
        [torch.quantize_per_tensor(GRADIENTS[0].float(), 0.1, 0, torch.qint8), *GRADIENTS[1:]],
        "'0.weight' is quantised (qint8); it must be a dense tensor with values: call .dequantize()",
    ),
    "float8": (
        [GRADIENTS[0].to(torch.float8_e5m2), *GRADIENTS[1:]],
        "'0.weight' is float8_e5m2, a format without arithmetic; convert it to float32",
    ),
    "meta": ([GRADIENTS[0].to("meta"), *GRADIENTS[1:]], "'0.weight' is on the meta device"),
    "objects": ([np.array([None]), *GRADIENTS[1:]], "'0.weight' is array([None], dtype=object); it must be a tensor"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_the_others_are_refused_by_what_they_look_like(form):
    given, message = REFUSED[form]
    with pytest.raises(rgap.GradientMismatchError, match=re.escape(message)):
        receive(CHAIN, given)


def test_a_module_that_is_called_module_keeps_its_name():
    parameters = {"module.weight": rand(2), "weight": rand(3)}
    with pytest.raises(rgap.GradientMismatchError, match="unknown"):
        gradients_by_name(parameters, {"_orig_mod.module.weight": rand(2), "_orig_mod.weight": rand(3)})
    assert gradients_by_name(parameters, dict(parameters))[0] == parameters


def test_the_noise_of_an_update_follows_its_names():
    after = network()
    after.load_state_dict({f"{name}": p - 0.1 * NAMED.get(name, 0) for name, p in MODEL.state_dict().items()})
    update = client.gradients_from_update(MODEL, after, 0.1)
    prefixed = type(update)(
        {f"module.{name}": g for name, g in update.items()},
        {f"module.{name}": std for name, std in update.noise_std.items()},
    )
    assert receive(CHAIN, prefixed).noise_std == receive(CHAIN, update).noise_std != {}


def test_unflatten_gives_frozen_parameters_none():
    model = network()
    model[1].requires_grad_(False)
    trained = [g for g, p in zip(GRADIENTS, model.parameters(), strict=True) if p.requires_grad]
    parts = client.unflatten(model, nn.utils.parameters_to_vector(trained))
    assert [None if p is None else p.shape for p in parts] == [
        p.shape if p.requires_grad else None for p in model.parameters()
    ]
    with pytest.raises(rgap.GradientMismatchError, match=r"vector has shape \(3,\); the parameters have 139 entries"):
        client.unflatten(model, torch.zeros(3))


def test_none_zeros_and_a_shorter_mapping_say_the_same_at_every_entry(tmp_path):
    model = sequential(
        nn.Conv2d(1, 6, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(96, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)
    )
    model[3].requires_grad_(False)
    zeros = client.client_gradients(model, IMAGE, LABEL)
    names = [name for name, _ in model.named_parameters()]
    none = [None if name.startswith("3.") else g for name, g in zip(names, zeros, strict=True)]
    fewer = {name: g for name, g in zip(names, none, strict=True) if g is not None}
    saved = client.load_gradients(client.save_gradients(tmp_path / "g.pt", none))
    assert [g is None for g in saved] == [g is None for g in none]
    halves = client.prune(none, 0.0)
    assert halves[2] is None and client.clip_and_noise(none, 1e9, 0.0)[2] is None
    results = [rgap.reconstruct(model, g, SHAPE) for g in (zeros, none, fewer, saved, halves)]
    assert {r.verdict for r in results} == {results[0].verdict}
    assert all(r.images.equal(results[0].images) for r in results)
    matched = [baselines.dlg(model, g, SHAPE, steps=2, dtype=torch.float64) for g in (zeros, none, fewer)]
    assert all(m.images.equal(matched[0].images) for m in matched)
    assert [baselines.hybrid(model, g, SHAPE, steps=2).verdict for g in (none, fewer)] == [results[0].verdict] * 2
    with pytest.raises(
        rgap.GradientMismatchError, match="2 is None, and safetensors hold tensors alone; save a mapping"
    ):
        client.save_gradients(tmp_path / "g.safetensors", none)
