"""Version of a distribution, whether it is installed or only lies on ``PYTHONPATH``."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

UNKNOWN = "0+unknown"


def package_version(distribution: str, source_file: str) -> str:
    """Return the version of ``distribution``.

    Taken from the installed metadata, else from the ``pyproject.toml`` of the checkout that holds
    ``source_file``.

    Args:
        distribution: Name on the package index, for example ``"shared-kernels"``.
        source_file: ``__file__`` of a module directly inside the import package.

    Returns:
        The version, or ``"0+unknown"`` when neither source names this distribution.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return _checkout_version(distribution, source_file)


def _checkout_version(distribution: str, source_file: str) -> str:
    # <project>/src/<package>/<module>.py
    pyproject = Path(source_file).resolve().parents[2] / "pyproject.toml"
    if not pyproject.is_file():
        return UNKNOWN
    project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != distribution:
        return UNKNOWN
    return project.get("version", UNKNOWN)


__version__ = package_version("shared-kernels", __file__)
