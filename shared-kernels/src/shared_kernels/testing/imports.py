"""Which modules does a piece of code load? Answered in a fresh interpreter.

Needs nothing but the standard library, so that the tests of every package can use it to hold the
rule that importing a package, or asking a command for its help, stays cheap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HEAVY_MODULES = frozenset(
    {
        "accelerate",
        "cyclopts",
        "datasets",
        "matplotlib",
        "numba",
        "pandas",
        "peft",
        "scipy",
        "torch",
        "transformers",
        "triton",
        "trl",
    }
)
"""Modules that ``import <package>`` must not load."""

_CHILD = """
import json, sys
path, code = sys.argv[1:3]
sys.argv = ["code"]
status = 0
try:
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
except SystemExit as stop:
    status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
names = sorted(sys.modules)
with open(path, "w", encoding="utf-8") as file:
    json.dump({"status": status, "modules": names}, file)
"""


def modules_loaded_by(
    code: str, *, env: Mapping[str, str] | None = None, timeout: float = 120.0
) -> frozenset[str]:
    """Run ``code`` in a fresh interpreter and return the names in its ``sys.modules``.

    A ``SystemExit(0)``, as raised by a command's ``--help``, counts as success.

    Args:
        code: Python statements.
        env: Environment variables set on top of the present ones.
        timeout: Seconds before the interpreter is stopped.

    Returns:
        Full dotted module names.

    Raises:
        RuntimeError: The code raised or exited with another status; the message holds its stderr.
        subprocess.TimeoutExpired: The code ran longer than ``timeout``.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "modules.json"
        process = subprocess.run(
            [sys.executable, "-c", _CHILD, str(answer), code],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "EAGER_IMPORT": "", **(env or {})},
            check=False,
        )
        if not answer.is_file():
            raise RuntimeError(f"expected this code to run:\n{code}\nit failed:\n{process.stderr}")
        result = json.loads(answer.read_text(encoding="utf-8"))
    if result["status"] != 0:
        raise RuntimeError(
            f"expected this code to exit with 0:\n{code}\n"
            f"it exited with {result['status']}:\n{process.stdout}{process.stderr}"
        )
    return frozenset(result["modules"])


def assert_does_not_load(
    code: str,
    forbidden: Iterable[str] = HEAVY_MODULES,
    *,
    env: Mapping[str, str] | None = None,
) -> None:
    """Fail if running ``code`` in a fresh interpreter loads a forbidden module.

    Args:
        code: Python statements, for example ``"import zo2"``.
        forbidden: Names of modules; a submodule counts as its parent.
        env: Environment variables set on top of the present ones.

    Raises:
        AssertionError: A forbidden module was loaded; the message names it.
        RuntimeError: The code did not run.
    """
    loaded = modules_loaded_by(code, env=env)
    found = sorted(set(forbidden) & loaded)
    if found:
        raise AssertionError(
            f"expected {code!r} to load none of {sorted(forbidden)}; it loaded {found}. "
            "Move the import into the function that needs it, or list the name in the .pyi stub."
        )
