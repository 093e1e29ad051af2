"""Kernels interpreted on the CPU, tiny models, and prompts."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["SHARED_KERNELS_STRICT"] = "1"


@pytest.fixture
def cuda():
    """Skip without a CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
