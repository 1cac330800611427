import json
import sys
import textwrap

import pytest
from torch import nn

from rgap import models
from rgap.ranks import audit as audits


@pytest.fixture(scope="module")
def cnn6():
    return audits.audit(models.cnn6(), (3, 32, 32), limit=0)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    source = """
        from torch import nn
        def small(classes=2):
            return nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(192, classes))
        def narrow():
            return nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
        ready = small()
        class Zoo:
            made = staticmethod(small)
        def broken():
            raise KeyError("weights")
        def needs(something):
            return small()
        number = 3
    """
    (tmp_path / "my_networks.py").write_text(textwrap.dedent(source))
    (tmp_path / "my_broken_module.py").write_text("import no_such_package_here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audits.artifact, "ROOT", tmp_path)
    yield tmp_path
    sys.modules.pop("my_networks", None)


def run(capsys, *arguments):
    status = audits.main(list(arguments))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_table_has_what_decides(cnn6):
    table = cnn6.table()
    assert table.columns.tolist() == audits.COLUMNS and len(table) == 7
    assert set(table["status"]) == {"determined"}
    assert set(audits.COLUMNS) < set(cnn6.to_frame().columns)


def test_the_sentences_give_the_outcome_and_the_advice(cnn6):
    assert cnn6.sentences[0] == cnn6.exposure.sentence
    assert len(cnn6.sentences) == 2 + len(cnn6.advice)
    assert audits.audit(models.cnn6(width=14), (3, 32, 32), limit=0).sentences[0].startswith("stops: ")


def test_as_a_dictionary_it_is_plain_json(cnn6):
    found = json.loads(json.dumps(cnn6.to_dict(), allow_nan=False))
    assert found["outcome"] == "leaks" and found["batch_size"] == 1 and found["image_shape"] == [3, 32, 32]
    assert len(found["layers"]) == len(cnn6.analysis.layers)
    assert [layer["status"] for layer in found["layers"][:2]] == ["determined", None]
    assert found["advice"][0]["sentence"] == cnn6.advice[0].sentence


@pytest.mark.parametrize("name", ["my_networks:small", "my_networks:ready", "my_networks:Zoo.made"])
def test_networks_are_found_in_the_working_directory(mine, name):
    model, shape = audits.load_model(name)
    assert isinstance(model, nn.Sequential) and shape is None
    assert str(mine) not in sys.path


def test_the_exit_status_says_whether_it_leaks(mine, capsys):
    status, out, _ = run(capsys, "--model", "my_networks:small", "--shape", "3,8,8")
    assert status == 1 and "\nleaks: every one of 2 steps" in out and "output channels of '0'" in out
    assert json.loads((mine / "build/audit/my_networks-small.json").read_text())["model"] == "my_networks:small"
    assert f"written {mine}/build/audit/my_networks-small.json" in out
    assert run(capsys, "--model", "my_networks:narrow", "--shape", "1,4,4")[0] == 0
    assert run(capsys, "--model", "resnet18", "--json", "deep/er.json")[0] == 3
    assert (mine / "deep" / "er.json").is_file()


def test_json_alone_on_standard_output(mine, capsys):
    status, out, err = run(capsys, "--model", "my_networks:small", "--shape", "3,8,8", "--batch", "2", "--json", "-")
    assert json.loads(out)["batch_size"] == 2 and err == "" and status in audits.STATUS.values()
    assert not (mine / "build").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "cnn7"],
            "model is 'cnn7'; give cnn6, cnn6_d, cnn6_batch, fcn3, lenet, resnet18, or m",
        ),
        (["--model", "my_networks:"], "model is 'my_networks:'; give cnn6"),
        (["--model", "no_such_module_here:net"], "module 'no_such_module_here' cannot be imported: ModuleNotFound"),
        (["--model", "my_broken_module:net"], "module 'my_broken_module' cannot be imported: ModuleNotFoundError: No "),
        (["--model", "my_networks:absent"], "model is 'my_networks:absent'; my_networks has no 'absent'"),
        (["--model", "my_networks:broken"], "model is 'my_networks:broken'; calling it without arguments failed: Key"),
        (["--model", "my_networks:needs"], "model is 'my_networks:needs'; calling it without arguments failed: "),
        (["--model", "my_networks:number"], "model is 'my_networks:number'; that is a int, and a torch.nn.Module is"),
        (["--model", "my_networks:small"], "shape is missing; give the image shape that my_networks:small takes"),
        (["--shape", "3,32,x"], "shape is '3,32,x'; give whole numbers with commas between"),
        (["--shape", "3,20,20"], "image_shape (3, 20, 20) does not fit the network at layer '13'"),
        (["--shape", "3,0,3"], "image_shape is (3, 0, 3)"),
        (["--batch", "0"], "batch_size is 0"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_two(mine, capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith(f"audit: {message}") and err.count("\n") == 1
    assert not (mine / "build").exists()
