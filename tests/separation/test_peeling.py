from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import rgap
from rgap.separation.linear_units import linear_part
from rgap.separation.peeling import peel
from rgap.separation.search import separate
from rgap.separation.subspaces import row_span
from rgap.shared_gradient import receive

FEATURES, UNITS, CLASSES = 60, 240, 4


def table(count, seed=0):
    """Rows of a table around a common mean: units that one row alone switches on exist."""
    generator = torch.Generator().manual_seed(seed)
    rows = 0.6 + 0.25 * torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return rows.clamp(0, 1), torch.randint(0, CLASSES, (count,), generator=generator)


def network(hidden=(UNITS,), *, bias=True, activation=nn.ReLU, outputs=CLASSES, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    widths, modules = (FEATURES, *hidden, outputs), []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after, bias=bias), activation()]
    return nn.Sequential(*modules[:-1]).to(dtype)


def attacked(model, rows, labels, loss="cross_entropy", batch_size="given", **options):
    dtype = next(model.parameters()).dtype
    gradients = rgap.client_gradients(model, rows.to(dtype), labels, loss=loss)
    size = len(rows) if batch_size == "given" else batch_size
    return rgap.reconstruct(model, gradients, (FEATURES,), loss, batch_size=size, **options)


def distances(images, rows):
    return (images[:, None] - rows).square().mean(2).sqrt()


def found_rows(result, rows):
    """How many different true rows the images of a result are, and the largest distance of one from its row."""
    nearest = distances(result.images, rows).min(1)
    return len(set(nearest.indices.tolist())), nearest.values.max().item()


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.1)])
def test_batches_far_beyond_the_classes_come_back_with_repeated_labels(activation):
    rows, labels = table(30)
    result = attacked(network(activation=activation), rows, labels)
    assert result.images.shape == (30, FEATURES) and result.verdict == "exact"
    assert found_rows(result, rows)[0] == 30 and found_rows(result, rows)[1] < 1e-9
    order = torch.cdist(result.images, rows).argmin(1)
    assert result.labels.tolist() == labels[order].tolist()
    assert any("peeled off" in note for note in result.notes)


def test_the_shares_tell_the_batch_size():
    rows, labels = table(24)
    result = attacked(network(), rows, labels, batch_size=None)
    assert result.verdict == "exact" and any("a mean over 24 images" in note for note in result.notes)


def test_where_equal_rows_hide_the_batch_size_the_shares_tell_it():
    rows, labels = table(28)
    rows[1], labels[1] = rows[0], labels[0]
    result = attacked(network((300,)), rows, labels, batch_size=None, gradient_scale=1.0)
    assert any("the batch has 28, of which 27 differ" in note for note in result.notes)
    assert result.verdict == "rank-deficient" and len(result.images) >= 20
    assert "exact" in [verdict for verdict, _ in result.per_image]


def test_a_factor_of_the_gradient_is_estimated_from_the_shares():
    rows, labels = table(28)
    model = network((300,))
    gradients = [3.5 * g for g in rgap.client_gradients(model, rows, labels, loss="cross_entropy")]
    result = rgap.reconstruct(model, gradients, (FEATURES,), "cross_entropy", batch_size=28)
    assert result.verdict == "exact" and found_rows(result, rows)[0] == 28
    assert abs(result.gradient_scale - 3.5) < 1e-6
    assert any("a mean over 8 images, or of 3.5 times one over 28" in note for note in result.notes)


def test_logistic_loss_peels_too():
    rows, labels = table(8)
    result = attacked(network(outputs=1), rows, labels % 2, "logistic")
    assert result.verdict == "exact" and found_rows(result, rows)[0] == 8


@pytest.mark.slow
def test_deeper_networks_peel_and_are_searched_for_the_rest():
    rows, labels = table(40)
    result = attacked(network((UNITS, 120, 60)), rows, labels)
    assert result.verdict == "exact" and found_rows(result, rows)[0] == 40


def test_rows_of_both_gradients_start_the_search_for_what_does_not_peel():
    rows, labels = table(40)
    model = network((200, 200))
    chain = rgap.prepare(model, (FEATURES,))
    received = receive(chain, rgap.client_gradients(model, rows, labels, loss="cross_entropy"))
    spans = tuple(row_span(layer, received.gradients, received.precision) for layer in chain.layers[:2])
    peeled = peel(chain.layers, received, spans, "cross_entropy", 40)
    found = separate(
        *chain.layers[:2], received.gradients, precision=received.precision, spans=spans, known=peeled, by_rows=True
    )
    assert peeled.peeled < 30 and len(found.inputs) == 40
    assert distances(found.inputs, rows).min(1).values.max() < 1e-9


def test_what_is_found_in_deflated_spaces_alone_has_the_errors_of_the_inputs_known():
    """The second gradient has less rank than the batch has images, and no whole space refines an input."""
    rows, labels = table(16)
    model = network((200, 12))
    chain = rgap.prepare(model, (FEATURES,))
    received = receive(chain, rgap.client_gradients(model, rows, labels, loss="cross_entropy"))
    spans = tuple(row_span(layer, received.gradients, received.precision) for layer in chain.layers[:2])
    peeled = peel(chain.layers, received, spans, "cross_entropy", 16)
    known = {name: getattr(peeled, name)[:15] for name in ("inputs", "dz", "residuals")}
    known = replace(peeled, **known, errors=torch.full((15,), 1e-4), peeled=15)
    found = separate(
        *chain.layers[:2], received.gradients, precision=received.precision, spans=spans, known=known, by_rows=True
    )
    assert spans[1].rank < 16 == len(found.inputs) and (found.errors > 0.99e-4).all()


def test_what_is_missing_is_counted_and_what_is_found_is_certified():
    rows, labels = table(150)
    result = attacked(network(), rows, labels)
    count = len(result.images)
    assert result.verdict == "rank-deficient" and count < 150
    assert any("were not found" in note for note in result.notes)
    exact = [c[0].images for verdict, c in result.per_image if verdict == "exact"]
    assert all(distances(x, rows).min() < 1e-3 for x in exact)


def test_equal_images_with_other_labels_are_not_taken_for_one():
    rows, labels = table(20)
    rows[1], labels[0], labels[1] = rows[0], 0, 1
    result = attacked(network(), rows, labels)
    assert result.verdict == "rank-deficient"
    exact = torch.cat([c[0].images for verdict, c in result.per_image if verdict == "exact"])
    assert distances(exact, rows).min(1).values.max() < 1e-6


@pytest.mark.parametrize("level", [1e-6, 1e-4])
def test_noise_that_nobody_declared_widens_what_is_promised(level):
    rows, labels = table(20)
    model, generator = network((200, 60), dtype=torch.float32), torch.Generator().manual_seed(0)
    gradients = rgap.client_gradients(model, rows.float(), labels, loss="cross_entropy")
    gradients = [g + level * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator) for g in gradients]
    result = rgap.reconstruct(model, gradients, (FEATURES,), "cross_entropy", batch_size=20, gradient_scale=1.0)
    for verdict, (best, *_) in result.per_image:
        assert verdict != "exact" or distances(best.images, rows).min() <= 10 * best.predicted_error


def test_single_precision_gives_only_true_rows():
    rows, labels = table(30)
    result = attacked(network(dtype=torch.float32), rows, labels)
    exact = torch.cat([c[0].images for verdict, c in result.per_image if verdict == "exact"])
    assert len(exact) >= 20 and distances(exact, rows).min(1).values.max() < 3e-3


def test_the_shares_add_up_to_the_gradient():
    rows, labels = table(20)
    model = network()
    chain = rgap.prepare(model, (FEATURES,))
    received = receive(chain, rgap.client_gradients(model, rows, labels, loss="cross_entropy"))
    spans = tuple(row_span(layer, received.gradients, received.precision) for layer in chain.layers[:2])
    found = peel(chain.layers, received, spans, "cross_entropy", 20)
    assert found.peeled == 20 and abs(20 * found.factor - 1) < 1e-9
    shared = received.gradients["0.weight"]
    assert (found.dz.T @ found.inputs - shared).norm() < 1e-9 * shared.norm()


def test_linear_part_is_that_of_the_units_that_agree():
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    M = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    rows = E @ M
    rows[15:] += torch.randn(35, 12, generator=generator, dtype=torch.float64)
    noise = torch.full((50,), 1e-12, dtype=torch.float64)
    found = linear_part(E, rows, noise, torch.arange(50), generator)
    assert (found.rows - E @ M).norm() < 1e-9
    assert linear_part(E, rows, noise, torch.arange(15, 50), generator) is None
