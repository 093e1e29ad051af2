import ast
import subprocess
import sys
from pathlib import Path

import pytest
import shared_kernels
from shared_kernels.testing.imports import assert_does_not_load, modules_loaded_by
from shared_kernels.versions import UNKNOWN, package_version

SOURCE = Path(shared_kernels.__file__).parent
STUBS = sorted(SOURCE.rglob("__init__.pyi"))


def stub_names(stub: Path) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_import_loads_nothing_heavy():
    assert_does_not_load("import shared_kernels")


def test_version_loads_nothing_heavy():
    assert_does_not_load("import shared_kernels; assert shared_kernels.__version__")


@pytest.mark.parametrize(
    "code",
    [
        "import shared_kernels, cyclopts",
        "import numba",
        "import shared_kernels; shared_kernels.bench; import matplotlib.colors",
    ],
)
def test_the_check_can_fail(code):
    with pytest.raises(AssertionError, match="it loaded"):
        assert_does_not_load(code)


def test_the_check_sees_lazily_loaded_submodules():
    loaded = modules_loaded_by("import shared_kernels; shared_kernels.bench")
    assert "shared_kernels.bench" in loaded
    assert "shared_kernels.bench" not in modules_loaded_by("import shared_kernels")


def test_code_that_does_not_run_is_an_error_not_a_pass():
    with pytest.raises(RuntimeError, match="no_such_module"):
        assert_does_not_load("import no_such_module")
    with pytest.raises(RuntimeError, match="exited with 3"):
        assert_does_not_load("raise SystemExit(3)")


def test_exit_zero_counts_as_success():
    assert "json" in modules_loaded_by("import json; raise SystemExit(0)")


def test_all_lazy_names_resolve():
    loaded = modules_loaded_by("import shared_kernels", env={"EAGER_IMPORT": "1"})
    names = stub_names(SOURCE / "__init__.pyi") - {"__version__"}
    assert {f"shared_kernels.{name}" for name in names} <= loaded


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_dir_equals_stub(stub):
    package = ".".join(stub.parent.relative_to(SOURCE.parent).parts)
    code = f"import {package} as p; print(*sorted(p.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == stub_names(stub)


def test_version_of_an_installed_distribution():
    assert package_version("pytest", __file__) == pytest.__version__


def test_version_falls_back_to_the_checkout(tmp_path):
    module = tmp_path / "src" / "not_installed" / "versions.py"
    module.parent.mkdir(parents=True)
    assert package_version("not-installed-dist", str(module)) == UNKNOWN
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\nname = "another-dist"\nversion = "9.9"\n')
    assert package_version("not-installed-dist", str(module)) == UNKNOWN
    pyproject.write_text('[project]\nname = "not-installed-dist"\nversion = "1.2.3"\n')
    assert package_version("not-installed-dist", str(module)) == "1.2.3"
