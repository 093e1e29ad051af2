"""Modes of the kernel tests, set before anything imports triton."""

import os

import pytest
import torch

# Without a GPU the kernels run interpreted; with one, the same tests run them on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["SHARED_KERNELS_STRICT"] = "1"
os.environ.setdefault("SHARED_KERNELS_AUTOTUNE", "off")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Device on which ``impl="triton"`` runs: the CPU through the interpreter, or a GPU."""
    has_gpu = torch.cuda.is_available()
    if request.param == "cuda":
        if not has_gpu:
            pytest.skip("needs a CUDA device")
        return "cuda"
    if has_gpu:
        pytest.skip("the kernels are compiled for the GPU in this process")
    pytest.importorskip("triton")
    return "cpu"


@pytest.fixture
def cuda() -> str:
    """Skip without a CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
