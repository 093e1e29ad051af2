"""Exit status, JSON and tables of command lines."""

import json

import pytest
from cyclopts import App
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

ERRORS = {
    "ValueError": (ValueError("width: expected 1, got 0"), 2, "error: width: expected 1, got 0"),
    "FileNotFoundError": (FileNotFoundError("no such file"), 2, "error: no such file"),
    "ImportError": (ImportError("install it"), 2, "error: install it"),
    "OSError": (OSError("disk full"), 1, "error: OSError: disk full"),
    "RuntimeError": (RuntimeError("it broke"), 1, "error: RuntimeError: it broke"),
    "FloatingPointError": (FloatingPointError("inf"), 1, "error: FloatingPointError: inf"),
    "KeyError": (KeyError("named"), 2, "error: 'named'"),
}


def make_app(error=None, code=None):
    app = App(name="example", result_action="return_value")

    @app.command
    def work(*, json_output: JsonFlag = False):
        if error is not None:
            raise error
        return print_json({"json": json_output}) if code is None else code

    return app


@pytest.mark.parametrize(("error", "status", "line"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_become_one_line_and_a_status(error, status, line, capsys):
    assert run_app(make_app(error), ["work"], bad_input=(KeyError,)) == status
    assert capsys.readouterr().err.strip() == line


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_app(make_app(ZeroDivisionError()), ["work"])


def test_results(capsys):
    assert run_app(make_app(), ["work", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"json": True}
    assert run_app(make_app(code=1), ["work"]) == 1
    assert run_app(make_app(), ["play"]) == 2
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json(float("nan"))


def test_tables(capsys):
    print_table([("a", "1")], title="found")
    print_table([("b", "2")], ("name", "value"))
    first, second = capsys.readouterr().out.split("b", 1)
    assert "found" in first
    assert "name" in first
    assert first.index("name") > first.index("1")
    assert "2" in second
