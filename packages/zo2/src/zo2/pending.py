"""The update records that some block has not folded yet, kept on the device.

A record's scalar g is computed on the device and read there by the next step's kernels, so a step
needs no host synchronisation. Rows live in a window that is refilled with the seeds of many steps
ahead; folding never lags by more than ``fold_every`` steps, so older rows can go.
"""

from __future__ import annotations

import numpy as np
import torch
from shared_kernels.random import derive_seed, derive_seeds

from zo2.updates import update_rows

__all__ = ["PendingRecords"]

_WINDOW = 512


class PendingRecords:
    """A window of rows for ``zo_materialize``: keys int32 (rows, 3), coefficients fp32 (rows, 2).

    ``step`` counts the records committed so far; step t has q rows.
    """

    def __init__(self, run_seed: int, q: int, fold_every: int, device: torch.device) -> None:
        self.run_seed, self.q, self.device = run_seed, q, device
        self.step = 0
        self._history = fold_every
        self._first = 0
        self._keys = torch.empty(0, 3, dtype=torch.int32, device=device)
        self._coefs = torch.empty(0, 2, dtype=torch.float32, device=device)
        self._seeds: list[int] = []
        self._refill()

    def _refill(self) -> None:
        """Start a window at the oldest row that may still be needed."""
        first = max(self._first, self.step - self._history)
        kept = slice((first - self._first) * self.q, (self.step - self._first) * self.q)
        coefs = torch.zeros(
            (self._history + _WINDOW) * self.q, 2, dtype=torch.float32, device=self.device
        )
        if self._coefs.numel():
            coefs[: kept.stop - kept.start] = self._coefs[kept]
        self._first, self._coefs = first, coefs
        self._seed_window(self._history + _WINDOW)

    def _seed_window(self, count: int) -> None:
        seeds = derive_seeds(self.run_seed, self._first, count)
        self._seeds = [int(seed) for seed in seeds]
        words = np.zeros((count, self.q, 3), np.uint32)
        words[:, :, 0] = (seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
        words[:, :, 1] = (seeds >> np.uint64(32)).astype(np.uint32)[:, None]
        words[:, :, 2] = np.arange(self.q, dtype=np.uint32)
        self._keys = torch.from_numpy(words.reshape(-1, 3).view(np.int32)).to(self.device)

    @property
    def seed(self) -> int:
        """The seed of the step that comes next."""
        return self._seeds[self.step - self._first]

    @property
    def flush_seed(self) -> int:
        """Seed of the rounding dither of a flush before the next step."""
        return derive_seed(self.run_seed, self.step + (1 << 40))

    def rows(self, steps: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and coefficients of the records ``steps.start`` .. ``steps.stop - 1``, in order."""
        cut = slice((steps.start - self._first) * self.q, (steps.stop - self._first) * self.q)
        return self._keys[cut], self._coefs[cut]

    def append(
        self, g: torch.Tensor, lr: float, weight_decay: float, clip: float | None = None
    ) -> torch.Tensor:
        """Commit a step. Non-finite or clipped-away g skips it: its rows have no effect.

        Args:
            g: float32 (q,) on the device.
            lr: Learning rate; used as float32.
            weight_decay: λ; used as float32.
            clip: Largest |g| that is applied.

        Returns:
            Whether the step counts, a bool tensor without dimensions, on the device.
        """
        if (self.step + 1 - self._first) * self.q > len(self._keys):
            self._refill()
        rate = np.float32(lr)
        keep = float(np.float32(1) - rate * np.float32(weight_decay))
        ok = torch.isfinite(g).all()
        if clip is not None:
            ok &= (g.abs() <= clip).all()
        at = (self.step - self._first) * self.q
        row = self._coefs[at : at + self.q]
        row[:, 0] = 1.0
        row[0, 0].copy_(torch.where(ok, torch.full_like(g[0], keep), 1.0))
        row[:, 1] = torch.where(ok, g * float(rate / np.float32(self.q)), 0.0)
        self.step += 1
        return ok

    def restore(self, records: np.ndarray) -> None:
        """Load the update records of a run that is to go on.

        All rows are kept until the next refill, so that stores can be brought up to date from any.

        Args:
            records: Structured array of update records, without flushes, from step 0.
        """
        keys, coefs = update_rows(records)
        self._coefs = torch.zeros(
            len(coefs) + _WINDOW * self.q, 2, dtype=torch.float32, device=self.device
        )
        self._coefs[: len(coefs)] = torch.from_numpy(np.ascontiguousarray(coefs))
        self._first, self.step = 0, len(records)
        self._seed_window(len(records) + _WINDOW)
        if not np.array_equal(self._keys[: len(keys)].cpu().numpy(), keys):
            raise ValueError(
                f"the log's seeds are not those of run seed {self.run_seed}: resume with the "
                "seed the run was started with"
            )
