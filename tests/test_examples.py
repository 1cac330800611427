"""Every public function's docstring has an example, and what the example prints is what stands there."""

import doctest
import inspect

import pytest

import rgap
from rgap import artifact, baselines, client, data, metrics, models


def public_functions():
    """Name -> function, of the library's face and of its public modules."""
    found = {}
    for module in (rgap, artifact, baselines, client, data, metrics, models):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            if inspect.isroutine(getattr(module, name)) and not name.startswith("_"):
                found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


FUNCTIONS = public_functions()


def test_there_are_functions_and_those_of_the_face_among_them():
    assert {"rgap.reconstruct", "rgap.client.prune", "rgap.models.cnn6", "rgap.metrics.mse"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs_and_prints_what_stands_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RGAP_FIGURES", str(tmp_path))
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(FUNCTIONS[name]), {}, name, None, 0)
    assert test.examples
    said = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
