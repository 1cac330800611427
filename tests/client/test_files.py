import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import randn, small_cnn
from torch import nn

import rgap
from rgap import client
from rgap.client.files import load_weights, save_weights
from rgap.results import GradientMismatchError


def as_list():
    return [randn(2, 3), randn(4, seed=1).float(), randn(1, seed=2).half()]


def as_mapping():
    return {"conv.weight": randn(2, 3), "conv.bias": randn(2, seed=1)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("make", [as_list, as_mapping])
def test_what_was_saved_is_loaded(tmp_path, suffix, make):
    path = client.save_gradients(tmp_path / "sub" / f"g{suffix}", make())
    loaded = client.load_gradients(str(path))
    assert type(loaded) is type(make())
    names = make().keys() if make is as_mapping else range(3)
    assert len(loaded) == len(names)
    assert all(loaded[n].dtype == make()[n].dtype and torch.equal(loaded[n], make()[n]) for n in names)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_eleven_tensors_keep_their_order_and_views_are_no_obstacle(tmp_path):
    flat = randn(22)
    path = client.save_gradients(tmp_path / "g.safetensors", list(flat.reshape(11, 2)))
    assert torch.equal(torch.stack(client.load_gradients(path)), flat.reshape(11, 2))


def test_a_loaded_gradient_gives_the_image_away(tmp_path):
    model = small_cnn()
    image, label = rgap.data.load_images(count=1, image_shape=(3, 8, 8), classes=2)
    gradients = rgap.client_gradients(model, image, label)
    named = dict(zip([n for n, _ in model.named_parameters()], gradients, strict=True))
    loaded = client.load_gradients(client.save_gradients(tmp_path / "g.safetensors", named))
    assert (
        rgap.metrics.psnr_db(rgap.reconstruct(model, loaded, (3, 8, 8), gradient_scale=1.0).images, image.double())
        > 100
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (randn(3), "a Tensor; give a list or a mapping with a tensor for each"),
        (3, "a int; give a list"),
        ([], "no tensor; give one for each parameter"),
        ({}, "no tensor"),
        ([randn(2), [1.0]], "1 is a list; it must be a tensor"),
        ({"state": {"w": randn(2)}}, "'state' is a dict; it must be a tensor"),
    ],
)
def test_what_is_no_gradient_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(GradientMismatchError, match=f"gradients: {message}"):
        client.save_gradients(tmp_path / "g.pt", content)
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(GradientMismatchError, match=f"mine.pt: {message}"):
        client.load_gradients(tmp_path / "mine.pt")
    assert not (tmp_path / "g.pt").exists()


class Payload:
    """What must never run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"no file of tensors", pickle.dumps(Payload())])
def test_files_that_are_something_else_are_refused_and_not_run(tmp_path, suffix, content):
    path = tmp_path / f"g{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"g{suffix} is no readable {suffix} file of tensors") as caught:
        client.load_gradients(path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert ("(it is empty)" in str(caught.value)) == (not content)


def test_code_in_a_torch_file_is_not_run(tmp_path):
    torch.save([Payload()], tmp_path / "g.pt")
    with pytest.raises(ValueError, match="reading that would run code"):
        client.load_gradients(tmp_path / "g.pt")


def test_missing_files_and_unknown_kinds_are_said(tmp_path):
    network = small_cnn().float()
    for read in (client.load_gradients, lambda path: load_weights(network, path)):
        for name in ("g.pt", "g.npz", "g"):
            with pytest.raises(FileNotFoundError, match=rf"there is no file .*{name}$"):
                read(tmp_path / "none" / name)
        for name in ("", "a.pt"):
            (tmp_path / name).mkdir(exist_ok=True)
            with pytest.raises(ValueError, match=r"is a folder; give a file of tensors, ending in \.safetensors"):
                read(tmp_path / name)
    for call in (client.load_gradients, lambda path: client.save_gradients(path, as_list())):
        for name, ending in (("g.npz", "ends in '.npz'"), ("g", "has no ending")):
            (tmp_path / name).touch()
            with pytest.raises(ValueError, match=f"{name} {ending}; files of tensors end in"):
                call(tmp_path / name)


def test_a_checkpoint_comes_back_with_its_facts(tmp_path):
    model = small_cnn().float()
    path = save_weights(model, tmp_path / "a" / "w.safetensors", {"model": "small", "epochs": 3})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"model": "small", "epochs": "3"}
    other = small_cnn(seed=1).float()
    assert load_weights(other, path)[0].weight.equal(model[0].weight)
    assert not other[0].weight.equal(model[0].weight)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_weights(other, str(tmp_path / "w.pt"))[0].weight.equal(model[0].weight)


def state_with(**changes):
    return small_cnn().float().state_dict() | changes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"no such thing", "no readable"),
        ("w.pt", b"no such thing", "no readable"),
        ("w.pt", b"", "no readable"),
        ("w.bin", b"", "ends in '.bin'; files of tensors end in .safetensors, .pt, .pth"),
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
        load_weights(small_cnn().float(), path)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save(small_cnn().float(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="reading that would run code"):
        load_weights(small_cnn().float(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(small_cnn().float(), tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [np.ones(3)],
            r"holds a numpy\S*, and reading that would run code; .* by torch.as_tensor before they are saved",
        ),
        ({"loss": np.float64(1.0)}, r"holds a numpy\S*, .* by torch.as_tensor"),
        (nn.Linear(2, 1), r"holds a torch.nn.modules.linear.Linear, .* save the state dict \(model.state_dict\(\)\)"),
    ],
    ids=["array", "number", "model"],
)
def test_objects_in_a_torch_file_are_refused_by_their_class_with_the_way_out(tmp_path, content, message):
    path = tmp_path / "g.pt"
    torch.save(content, path)
    for read in (client.load_gradients, lambda p: load_weights(nn.Linear(2, 1), p)):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert "\x1b" not in str(caught.value) and "weights_only" not in str(caught.value)
