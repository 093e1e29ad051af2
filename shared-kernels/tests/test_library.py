"""Declaration of ops and the choice of their implementation."""

import subprocess
import sys
import warnings

import pytest
import torch
from shared_kernels import _library
from shared_kernels._library import declare, force_impl, importable, interpreting, select
from shared_kernels.errors import FallbackError, KernelUnavailableError
from shared_kernels.testing import check_op

ALL = ("reference", "numba", "triton")
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def absent(monkeypatch):
    """Make modules look as if they were not installed."""

    def remove(*names):
        monkeypatch.setattr(_library, "importable", lambda name: name not in names)

    monkeypatch.setattr(_library, "_warned", set())
    return remove


def test_auto_takes_the_fast_implementation():
    assert select("op", "auto", CPU, ALL, None) == "numba"
    assert select("op", "auto", CUDA, ALL, None) == "triton"
    assert select("op", "auto", CPU, ("reference",), None) == "reference"
    assert select("op", "reference", CUDA, ALL, None) == "reference"


def test_strict_forbids_a_fallback_on_cuda(absent, monkeypatch):
    absent("triton")
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "1")
    with pytest.raises(FallbackError, match=r"op: falling back .* triton is not installed"):
        select("op", "auto", CUDA, ALL, None)


def test_a_fallback_warns_once_with_the_reason(absent, monkeypatch):
    absent("triton", "numba")
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "0")
    for device, reason in ((CUDA, "triton is not installed"), (CPU, "numba is not installed")):
        with pytest.warns(RuntimeWarning, match=reason):
            assert select("op", "auto", device, ALL, None) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select("op", "auto", device, ALL, None) == "reference"


def test_arguments_that_the_kernel_cannot_take(monkeypatch):
    monkeypatch.setattr(_library, "_warned", set())
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "0")
    with pytest.warns(RuntimeWarning, match="fp8 is too new"):
        assert select("op", "auto", CUDA, ALL, "fp8 is too new") == "reference"
    with pytest.raises(KernelUnavailableError, match="fp8 is too new"):
        select("op", "triton", CUDA, ALL, "fp8 is too new")


def test_an_implementation_asked_for_by_name_never_falls_back(absent, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelUnavailableError, match=r"got cpu .*TRITON_INTERPRET=1"):
        select("op", "triton", CPU, ALL, None)
    with pytest.raises(KernelUnavailableError, match="numba needs CPU tensors, got cuda:0"):
        select("op", "numba", CUDA, ALL, None)
    with pytest.raises(KernelUnavailableError, match=r"no such implementation .only reference"):
        select("op", "numba", CPU, ("reference",), None)
    absent("numba")
    with pytest.raises(KernelUnavailableError, match="numba is not installed"):
        select("op", "numba", CPU, ALL, None)


def test_force_impl_rules_auto_only_and_ends():
    with force_impl("reference"):
        assert select("op", "auto", CPU, ALL, None) == "reference"
        assert select("op", "numba", CPU, ALL, None) == "numba"
        with force_impl("auto"):
            assert select("op", "auto", CPU, ALL, None) == "numba"
        assert select("op", "auto", CPU, ALL, None) == "reference"
    assert select("op", "auto", CPU, ALL, None) == "numba"
    with pytest.raises(ValueError, match="impl: expected one of"), force_impl("fast"):
        pass


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False)])
def test_interpreting(monkeypatch, value, expected):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() is expected


def test_importable():
    assert importable("torch")
    assert not importable("a_module_nobody_has")


def test_declared_op_passes_the_checklist_and_dispatches():
    calls = []

    def implementation(name):
        def double(x, factor):
            calls.append(name)
            return x * factor

        return double

    op = declare(
        "library_test_double(Tensor x, float factor) -> Tensor",
        implementations={name: implementation(name) for name in ("reference", "numba")},
        fake=lambda x, factor: torch.empty_like(x),
    )
    assert torch.equal(op(torch.ones(3), 2.0, "auto"), torch.full((3,), 2.0))
    assert torch.equal(op(torch.ones(3), 2.0, "reference"), torch.full((3,), 2.0))
    assert calls == ["numba", "reference"]
    check_op(op, lambda n: (torch.arange(float(n)), 2.0, "reference"), sizes=[5, 0, 1])


def test_importing_the_families_does_not_import_triton_or_numba():
    code = (
        "import sys, shared_kernels.random, shared_kernels.ops.zo\n"
        "found = {'triton', 'numba', 'transformers', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spoiled = subprocess.run(
        [sys.executable, "-c", code.replace("import sys", "import numba, sys")],
        capture_output=True,
        text=True,
    )
    # numba itself imports scipy where that is installed
    assert spoiled.stderr.startswith("imported {")
    assert "'numba'" in spoiled.stderr


def test_all_ops_register_side_by_side():
    """No two families declare an op of one name: each alone would not show it."""
    import importlib
    import pkgutil

    from shared_kernels import ops

    names = [m.name for m in pkgutil.walk_packages(ops.__path__, "shared_kernels.ops.")]
    found = [importlib.import_module(name) for name in names if name.endswith(".op")]
    assert len(found) >= 6
