"""Declare an operation once, with several implementations, as an opaque ``torch.library`` op.

An op is registered with ``define``, ``impl`` (CPU and CUDA) and ``register_fake``; it ends with a
string argument ``impl``, and the choice of the implementation is made inside the op, so that
``torch.compile`` and FakeTensor see one opaque call. Triton is imported only when it runs.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch

from shared_kernels._checks import check_choice
from shared_kernels.errors import FallbackError, KernelUnavailableError

#: Values of the ``impl`` argument of public functions.
IMPLEMENTATIONS: Final = ("auto", "triton", "numba", "split", "reference")

_forced: ContextVar[str | None] = ContextVar("shared_kernels_forced_impl", default=None)
_warned: set[tuple[str, str]] = set()


@contextmanager
def force_impl(impl: str) -> Generator[None]:
    """Make every call with ``impl="auto"`` in this context use ``impl`` instead.

    Args:
        impl: One of ``triton``, ``numba``, ``split``, ``reference`` or ``auto``.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    token = _forced.set(impl)
    try:
        yield
    finally:
        _forced.reset(token)


def interpreting() -> bool:
    """Return whether ``TRITON_INTERPRET`` asks for kernels to be interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def strict() -> bool:
    """Return whether ``SHARED_KERNELS_STRICT`` makes a fallback an error."""
    return os.environ.get("SHARED_KERNELS_STRICT", "0") == "1"


@functools.cache
def importable(module: str) -> bool:
    """Return whether a top-level module is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def _warn_once(op: str, text: str) -> None:
    if (op, text) not in _warned:
        _warned.add((op, text))
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _why_not(impl: str, device: torch.device, unsupported: str | None) -> str | None:
    """Return why ``impl`` cannot run on ``device``, or None."""
    if impl == "triton":
        if not importable("triton"):
            return "triton is not installed (pip install triton)"
        if device.type != "cuda" and not interpreting():
            return (
                f"triton needs CUDA tensors, got {device} "
                "(set TRITON_INTERPRET=1 before triton is imported to interpret kernels on the CPU)"
            )
        return unsupported
    if impl == "numba":
        if not importable("numba"):
            return "numba is not installed (pip install numba)"
        if device.type != "cpu":
            return f"numba needs CPU tensors, got {device}"
    return None


def select(
    op: str, impl: str, device: torch.device, available: tuple[str, ...], unsupported: str | None
) -> str:
    """Choose the implementation of one call.

    Args:
        op: Name of the op, for messages.
        impl: What the caller asked for.
        device: Device of the tensors.
        available: Implementations that the op has; ``reference`` is always one.
        unsupported: Why the Triton kernel cannot take these arguments, or None.

    Returns:
        One of ``available``.

    Raises:
        KernelUnavailableError: The implementation asked for by name cannot run.
        FallbackError: ``auto`` on CUDA would fall back and ``SHARED_KERNELS_STRICT`` is 1.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "auto":
        impl = _forced.get() or "auto"
    if impl != "auto":
        reason = (
            _why_not(impl, device, unsupported)
            if impl in available
            else f"it has no such implementation (only {', '.join(available)})"
        )
        if reason is not None:
            raise KernelUnavailableError(
                f"{op}: impl={impl!r} cannot run: {reason}; use impl='auto' or 'reference'"
            )
        return impl
    preferred = "triton" if device.type == "cuda" else "numba"
    if preferred not in available:
        return "split" if "split" in available else "reference"
    reason = _why_not(preferred, device, unsupported)
    if reason is None:
        return preferred
    fallback = "split" if "split" in available else "reference"
    text = f"{op}: falling back to the slow {fallback} on {device}: {reason}"
    # numba and the reference give the same bits and no GPU time is lost, so that one only warns
    if preferred == "triton" and strict():
        raise FallbackError(text + "; SHARED_KERNELS_STRICT=1 forbids it")
    _warn_once(op, text)
    return fallback


def declare(
    schema: str,
    *,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    unsupported: Callable[..., str | None] = lambda *args: None,
) -> Callable[..., Any]:
    """Register ``shared_kernels::<schema>`` and return the op.

    Args:
        schema: Name, arguments and result in the language of ``torch.library``, for instance
            ``"scale_(Tensor(a!) x, float factor) -> ()"``. The first argument must be a tensor, or
            a list of at least one: its device decides. An argument ``str impl`` is appended.
        implementations: Functions of the schema's arguments, positional, keyed by ``reference``
            (required), ``triton``, ``numba`` and ``split`` (plain torch, faster than the
            definition). They import what they need inside.
        fake: Function of the schema's arguments that returns empty outputs.
        unsupported: Function of the schema's arguments that says why the Triton kernel cannot take
            them, or None.

    Returns:
        The op; call it with the arguments and the ``impl`` string, all positional.
    """
    name, rest = schema.split("(", 1)
    arguments, result = rest.rsplit(") ->", 1)
    qualified = f"shared_kernels::{name}"
    available = tuple(implementations)
    torch.library.define(qualified, f"({arguments}, str impl) ->{result}")

    def run(*args: Any) -> Any:
        *values, impl = args
        first = values[0]
        device = (first[0] if isinstance(first, list | tuple) else first).device
        reason = unsupported(*values) if device.type == "cuda" else None
        return implementations[select(name, impl, device, available, reason)](*values)

    torch.library.impl(qualified, ("cpu", "cuda"), run)
    torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]))
    return getattr(torch.ops.shared_kernels, name).default
