import pickle

import pytest
import torch
from cases import randn, small_cnn

import rgap
from rgap import client
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
    assert rgap.metrics.psnr_db(rgap.reconstruct(model, loaded, (3, 8, 8)).images, image.double()) > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (randn(3), "a Tensor, and a list or a mapping with a tensor for each"),
        (3, "a int, and a list"),
        ([], "no tensor; one for each parameter"),
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
    assert "\n" not in str(caught.value)


def test_code_in_a_torch_file_is_not_run(tmp_path):
    torch.save([Payload()], tmp_path / "g.pt")
    with pytest.raises(ValueError, match="no readable"):
        client.load_gradients(tmp_path / "g.pt")


def test_missing_files_and_unknown_kinds_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*g\.pt"):
        client.load_gradients(tmp_path / "g.pt")
    for call in (client.load_gradients, lambda path: client.save_gradients(path, as_list())):
        with pytest.raises(ValueError, match=r"g.npz ends in '.npz'; gradients are read from and written to"):
            call(tmp_path / "g.npz")
