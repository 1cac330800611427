"""Networks as users bring them: wrapped, with several outputs, parametrised, with their own forward."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import rand
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rgap
from rgap.network.tracing import trace

IMAGE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """Two convolutions and a linear layer, with a forward of one's own."""

    def __init__(self, forward=None, bias=True):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 1, 1, bias=bias), nn.Conv2d(16, 12, 3, 1, 1, bias=bias)
        self.act, self.fc = nn.LeakyReLU(0.2), nn.Linear(12 * 64, 4, bias=bias)
        self.own = forward

    def features(self, x):
        return self.act(self.conv2(self.act(self.conv1(x))))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1)) if self.own is None else self.own(self, x)


def quality(model, gradients, image, **options):
    result = rgap.reconstruct(model, gradients, IMAGE, "cross_entropy", **options)
    assert result.verdict == "exact"
    return rgap.metrics.psnr_db(result.images, image).item()


def attacked(model, **options):
    image = rand(1, *IMAGE)
    gradients = rgap.client_gradients(model, image, torch.tensor([1]), "cross_entropy", **options)
    return quality(model, gradients, image, **options)


WRAPPERS = {
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", [pytest.param(wrap, id=name) for name, wrap in WRAPPERS.items()])
def test_a_wrapped_network_is_the_one_inside_under_either_naming(wrap):
    model = Net().double()
    wrapped, image = wrap(model), rand(1, *IMAGE)
    gradients = rgap.client_gradients(wrapped, image, torch.tensor([1]), "cross_entropy")
    names = [name for name, _ in model.named_parameters()]
    assert list(rgap.prepare(wrapped, IMAGE).parameters) == names
    assert quality(wrapped, gradients, image) > 100
    assert quality(wrapped, dict(zip(names, gradients, strict=True)), image) > 100


def test_a_network_compiled_in_place_and_one_with_compiled_parts_are_traced():
    model = Net().double()
    model.conv1 = torch.compile(model.conv1, backend="eager")
    model.compile(backend="eager")
    assert attacked(model) > 100


@dataclasses.dataclass
class Record:
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: torch.Tensor


OUTPUTS = {
    "tuple": lambda s, x: (s.fc(s.features(x).flatten(1)), x),
    "mapping": lambda s, x: {"loss": None, "logits": s.fc(s.features(x).flatten(1)), "hidden": x},
    "record": lambda s, x: Record(None, s.fc(s.features(x).flatten(1)), x),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_of_several_outputs_the_first_tensor_is_taken(kind):
    assert attacked(Net(OUTPUTS[kind]).double()) > 100


@pytest.mark.parametrize(("kind", "output"), [("tuple", 1), ("mapping", "logits"), ("record", "logits")])
def test_an_output_is_chosen_by_name_or_place(kind, output):
    forward = OUTPUTS[kind]
    swapped = (lambda s, x: forward(s, x)[::-1]) if kind == "tuple" else forward
    assert attacked(Net(swapped).double(), output=output) > 100
    with pytest.raises(ValueError, match="no output 'nothing' that is a tensor"):
        rgap.client_gradients(Net(forward), rand(1, *IMAGE), torch.tensor([1]), "cross_entropy", output="nothing")


class Optional(Net):
    def forward(self, pixel_values, labels=None, return_dict=True):
        assert labels is None
        return super().forward(pixel_values)


def test_optional_arguments_keep_their_defaults_and_further_ones_are_named():
    assert attacked(Optional().double()) > 100

    class Two(Net):
        def forward(self, x, mask):
            return super().forward(x * mask)

    with pytest.raises(rgap.UnsupportedLayerError, match=r"Two needs more than the image: \['mask'\]"):
        rgap.prepare(Two(), IMAGE)


def by_shapes(self, x):
    b, c, h, w = x.shape
    assert len(x) == b and c == 3 and isinstance(x, torch.Tensor)
    if x.shape[-1] != w or x.dim() != 4 or h % 2:
        raise ValueError("wrong size")
    x = self.features(x)
    return self.fc(x.view(len(x), x.size(1) * h * w))


HARMLESS = {
    "shapes": by_shapes,
    "copies": lambda s, x: s.fc(s.features(x.clone().contiguous()).to(x.device).view(x.shape[0], -1).clone()),
    "casts": lambda s, x: s.fc(s.features(x.float()).type_as(s.fc.weight).flatten(1)),
    "cat of one": lambda s, x: s.fc(torch.cat([s.features(x)], 1).flatten(1)),
    "permute and back": lambda s, x: s.fc(s.features(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)).flatten(1)),
    "permute before linear": lambda s, x: s.fc(s.features(x).permute(0, 2, 3, 1).reshape(len(x), -1)),
    "flip": lambda s, x: s.fc(s.act(s.conv2(s.act(s.conv1(x)))).flip(1).flatten(1)),
    "log softmax": lambda s, x: F.log_softmax(s.fc(s.features(x).flatten(1)), dim=1),
    "functional": lambda s, x: F.linear(
        s.act(s.conv2(s.act(F.conv2d(x, s.conv1.weight, s.conv1.bias, padding=1)))).flatten(1), s.fc.weight, s.fc.bias
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_harmless(name):
    assert attacked(Net(HARMLESS[name])) > 60


def test_an_unused_head_is_harmless():
    model = Net()
    model.auxiliary = nn.Linear(5, 5)
    model.other = nn.Linear(12 * 64, 3)
    model.own = lambda s, x: (s.fc((h := s.features(x)).flatten(1)), s.other(h.flatten(1)))
    assert attacked(model.double()) > 100


def test_a_log_softmax_before_another_loss_is_refused():
    model = Net(HARMLESS["log softmax"]).double()
    gradients = rgap.client_gradients(model, rand(1, *IMAGE), torch.tensor([1]), "mse")
    with pytest.raises(rgap.UnsupportedLayerError, match="a logarithmic softmax before the mse loss"):
        rgap.reconstruct(model, gradients, IMAGE, "mse", gradient_scale=1.0)


REFUSED = [
    (lambda s, x: s.fc(s.features(x.flip(3)).flatten(1)), "'conv1' .Conv2d.: entries change places"),
    (lambda s, x: s.fc(s.features(x).half().float().flatten(1)), "'half' cannot be inverted: it rounds to float16"),
    (lambda s, x: s.fc((s.features(x) + torch.rand(())).flatten(1)), "'rand' cannot be inverted: rand draws random"),
    (lambda s, x: s.fc(F.conv2d(s.features(x), 2 * s.conv2.weight[:, :12], padding=1).flatten(1)), "is computed"),
    (lambda s, x: s.fc(torch.log_softmax(s.features(x), 1).flatten(1)), "the operation 'log_softmax' has"),
    (lambda s, x: s.fc(((h := s.act(s.conv1(x)))[:, :12] + h[:, 4:]).flatten(1)), "the operation 'getitem' has"),
    (lambda s, x: torch.from_numpy(s.fc(s.features(x).flatten(1)).numpy()), r"line \d+: .*numpy"),
    (lambda s, x: s.fc(s.features(x).flatten(1)) if x.mean() > 0 else None, r"line \d+: .*x.mean\(\) > 0"),
    (lambda s, x: "nothing", "gives no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "message"), REFUSED, ids=lambda value: value[:20] if isinstance(value, str) else ""
)
def test_what_cannot_be_inverted_is_refused_in_words(forward, message):
    with pytest.raises(rgap.UnsupportedLayerError, match=message) as error:
        rgap.prepare(Net(forward), IMAGE)
    assert "<" not in str(error.value) and " at 0x" not in str(error.value)


def test_a_failing_assertion_shows_the_users_own_line():
    with pytest.raises(ValueError, match=r"fit the network: .*users_networks.py, line \d+: assert .*c == 3"):
        rgap.prepare(Net(by_shapes), (1, 8, 8))


def test_tracing_leaves_the_network_and_other_threads_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    call = nn.Module.__call__
    trace(model, IMAGE)
    assert nn.Module.__call__ is call and model.training and not model[0]._forward_hooks
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


PARAMETRISED = {
    "weight norm": lambda m: parametrizations.weight_norm(m),
    "weight norm of all": lambda m: parametrizations.weight_norm(m, dim=None),
    "old weight norm": lambda m: nn.utils.weight_norm(m),
    "entrywise": lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()) or m,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_the_gradient_of_a_computed_weight_follows_from_its_parameters(name):
    model = Net()
    for part in ("conv1", "conv2", "fc"):
        setattr(model, part, PARAMETRISED[name](getattr(model, part)))
    assert attacked(model.double()) > 100


class Doubled(nn.Module):
    def forward(self, weight):
        return weight @ weight.T @ weight


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: parametrizations.spectral_norm(m.fc), "'fc' .*parametrised .SpectralNorm., and its gradient"),
        (lambda m: nn.utils.spectral_norm(m.fc), "'fc' .*parametrised .SpectralNorm., and its gradient"),
        (lambda m: prune.random_unstructured(m.fc, "weight", 0.5), "'fc' .*pruning.*1536 of 3072 entries are lost"),
        (lambda m: parametrize.register_parametrization(m.fc, "weight", Doubled()), "'fc' .*parametrised .Doubled."),
        (lambda m: parametrize.register_parametrization(m.fc, "bias", nn.Tanh()), "the bias of layer 'fc'"),
    ],
)
def test_a_weight_whose_gradient_does_not_follow_is_refused_by_name(change, message):
    model = Net()
    change(model)
    model(torch.zeros(1, *IMAGE))
    with pytest.raises(rgap.UnsupportedLayerError, match=message):
        rgap.prepare(model.eval(), IMAGE)
