"""The steps of the tour, one module for each package that works today."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.step import Step


def discover() -> dict[str, Step]:
    """Return the steps by name, in alphabetical order.

    Raises:
        TypeError: A module of this package has no ``STEP``.
    """
    steps: dict[str, Step] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        step = getattr(module, "STEP", None)
        if step is None:
            raise TypeError(f"expected a Step named STEP in {module.__name__}, found none")
        steps[step.name] = step
    return dict(sorted(steps.items()))
