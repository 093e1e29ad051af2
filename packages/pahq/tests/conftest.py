"""Kernels without a silent way out."""

import os

import pytest
import torch

os.environ["SHARED_KERNELS_STRICT"] = "1"


@pytest.fixture
def cuda():
    """Skip without a CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
