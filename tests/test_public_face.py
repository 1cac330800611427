"""What a user's code may rely on: names, signatures, fields and verdicts. Changing one changes the interface."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

import rgap
from rgap.results import VERDICTS

SIGNATURES = {
    "reconstruct": "model, gradients, image_shape=None, loss='logistic', *, batch_size=1, labels=None, "
    "virtual_constraints=True, pixel_range=(0.0, 1.0), rcond=None, noise_std=None, seed=0, device=None, output=None, "
    "effort='auto', gradient_scale=None, label_smoothing=None",
    "reconstruct_update": "before, after, image_shape=None, loss='logistic', *, learning_rate, steps=1, batch_size=1, "
    "momentum=0.0, weight_decay=0.0, optimizer='sgd', gradient_scale=None, labels=None, pixel_range=(0.0, 1.0), "
    "seed=0, device=None",
    "prepare": "model, image_shape, *, output=None",
    "client_gradients": "model, images, labels, loss='logistic', *, output=None, label_smoothing=0.0",
    "rank_analysis": "model, image_shape, batch_size=1, dtype=torch.float64, *, limit=4000, seed=0",
    "largest_batch": "model, image_shape, loss='cross_entropy', *, images=None",
    "baselines.dlg": "model, gradients, image_shape=None, loss='logistic', *, batch_size=1, labels=None, steps=1000, "
    "restarts=1, pixel_range=(0.0, 1.0), noise_std=None, dtype=torch.float32, seed=0, device=None",
    "baselines.inverting_gradients": "model, gradients, image_shape=None, loss='logistic', *, batch_size=1, "
    "labels=None, steps=1000, restarts=1, tv_weight=0.01, rate=0.05, pixel_range=(0.0, 1.0), noise_std=None, "
    "dtype=torch.float32, seed=0, device=None, training=None",
    "baselines.hybrid": "model, gradients, image_shape=None, loss='logistic', *, labels=None, steps=300, "
    "tv_weight=None, virtual_constraints=False, pixel_range=(0.0, 1.0), rcond=None, noise_std=None, "
    "dtype=torch.float64, seed=0, device=None",
    "data.load_images": "source='embedded', count=4, image_shape=(3, 32, 32), index=None, seed=0, split='test', "
    "classes=None",
    "models.cnn6": "seed=0, width=36, classes=1, head_bias=False",
    "models.cnn6_d": "seed=0",
    "models.cnn6_batch": "seed=0, hidden=(64,), classes=10, bias=False, width=36",
    "models.fcn3": "seed=0, widths=(1000, 100)",
    "models.lenet": "seed=0, classes=10, activation=<class 'torch.nn.modules.activation.Sigmoid'>, "
    "widths=(12, 12, 12), strides=None, bias=False, uniform=None",
    "models.resnet": "seed=0, widths=(16, 32, 64), blocks=1, activation=<class 'torch.nn.modules.activation.ReLU'>, "
    "expansion=0, flat_pixels=0, classes=10, kaiming=False",
    "models.resnet18": "seed=0, cut=(), classes=10",
    "metrics.mse": "x, y",
    "metrics.psnr_db": "x, y",
    "metrics.ssim": "x, y",
    "metrics.match": "images, references",
    "client.clip_and_noise": "gradients, clip_norm, noise_multiplier, seed=0",
    "client.epsilon": "noise_multiplier, sample_rate=1.0, steps=1, delta=1e-05",
    "client.gaussian_noise": "gradients, std, seed=0",
    "client.gradients_from_update": "before, after, learning_rate, *, steps=1, momentum=0.0, weight_decay=0.0",
    "client.gradients_of": "model, parameters, images, labels, loss, *, label_smoothing=0.0, weights=None",
    "client.load_gradients": "path",
    "client.loss_value": "loss, outputs, labels, *, label_smoothing=0.0, weights=None",
    "client.prune": "gradients, share",
    "client.quantise": "gradients, dtype",
    "client.save_gradients": "path, gradients",
    "client.unflatten": "model, vector",
    "artifact.check_claim": "claim_id, measured",
    "artifact.save_figure": "fig, name, *, times=False",
    "artifact.save_table": "frame, name, *, times=False",
}

FIELDS = {
    "Reconstruction": "images labels verdict candidates layers notes per_image certified_psnr_db gradient_scale",
    "Candidate": "images labels gradient_residual in_pixel_range layer_inputs layers open_layers beliefs "
    "residual_allowed predicted_error certified_psnr_db gradient_scale brightness_error",
    "LayerReport": "name unknowns rank_weights rank_gradients rank deficit virtual_constraints iterations condition "
    "sigma_above_cut sigma_below_cut residual predicted_error seconds saturated",
    "RankAnalysis": "layers batch_size max_ra_index copa_index leaking verdict separable entry",
    "LayerRank": "name kind unknowns weight_rows gradient_rows ra_index rank_weights rank_gradients rank deficit "
    "virtual_constraints condition law_weights law_gradients law_rank note blind law_proved",
    "LargestBatch": "batch_size alone limits reason bound safe peeled",
    "Chain": "model image_shape layers parameters log_softmax",
    "Layer": "name weight bias input_shape output_shape feature_shape stride padding dilation groups activation "
    "weight_name bias_name before after output_scale shift is_fixed cache is_frozen columns weight_terms",
    "baselines.Optimised": "images labels verdict candidates layers notes per_image certified_psnr_db "
    "gradient_scale history snapshots",
    "baselines.Snapshot": "restart step seconds images",
}

MODULES = {
    "artifact": "CLAIMS COLUMNS ROOT check_claim expected_outputs figures_dir forget_claims print_report profile "
    "read_claims report save_figure save_table write_atomically",
    "baselines": "Optimised Snapshot dlg hybrid inverting_gradients",
    "client": "LOSSES LOSS_OUTPUTS LocalTraining UpdateGradients check_loss check_smoothing client_gradients "
    "clip_and_noise epsilon gaussian_noise gradients_from_update gradients_of load_gradients loss_value "
    "mean_gradients outputs_fit prune quantise save_gradients unflatten",
}


def public(name):
    found = rgap
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_keep_their_parameters_and_defaults(name):
    signature = inspect.signature(public(name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)
    assert str(shown) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", FIELDS)
def test_records_keep_their_fields_and_are_frozen(name):
    record = public(name)
    assert [field.name for field in dataclasses.fields(record)] == FIELDS[name].split()
    assert record.__dataclass_params__.frozen


@pytest.mark.parametrize("name", MODULES)
def test_packages_keep_their_names(name):
    assert set(MODULES[name].split()) <= set(public(name).__all__)


def test_the_face_of_the_library():
    functions = {name for name in SIGNATURES if "." not in name}
    records = {name for name in FIELDS if "." not in name}
    errors = {"UnsupportedLayerError", "GradientMismatchError"}
    modules = {"artifact", "baselines", "client", "data", "metrics", "models"}
    assert set(rgap.__all__) == functions | records | errors | modules | {"__version__"}
    assert all(issubclass(public(error), ValueError) for error in errors)
    assert VERDICTS == ("rank-deficient", "inconsistent", "ambiguous", "exact")
    with pytest.raises(AttributeError, match="'rgap' has no attribute 'nothing'"):
        rgap.nothing  # noqa: B018


@pytest.mark.slow
def test_importing_the_library_leaves_out_what_is_slow_to_import_and_rarely_needed():
    slow = "{'torchmetrics', 'torchvision', 'torch._dynamo'} & set(sys.modules)"
    code = "import sys; from rgap import artifact, models; from rgap.experiments import audit, common, methods; "
    code += f"print({slow})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"
