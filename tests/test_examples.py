"""Every public function's docstring has an example, and what the example prints is what stands there."""

import doctest
import inspect

import pytest

from rgap.artifact.reference import MODULES, public

PUBLIC = {name: value for module in MODULES for name, value in public(module).items() if inspect.isroutine(value)}


def test_there_are_functions_and_those_of_the_face_among_them():
    assert {"rgap.reconstruct", "rgap.client.prune", "rgap.models.cnn6", "rgap.metrics.mse"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs_and_prints_what_stands_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RGAP_FIGURES", str(tmp_path))
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), {}, name, None, 0)
    assert test.examples
    said = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
