"""The noise step of differential privacy: one pass from the clipped sum to the private mean."""

from shared_kernels.ops.dp.noise.api import gaussian_step, gaussian_steps

__all__ = ["gaussian_step", "gaussian_steps"]
