"""Who may import whom: the contracts of the root pyproject, and that they cover every member."""

import subprocess
import sys
from pathlib import Path

import pytest


def lint(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.is_file():
        pytest.fail(f"expected import-linter beside {sys.executable}; run `uv sync`")
    return subprocess.run(
        [command, "--no-cache", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(folder), "NO_COLOR": "1"},
    )


def test_contracts_are_kept(root):
    done = lint(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_a_forbidden_import_inside_a_function_breaks_a_contract(tmp_path):
    for package in ("ground", "upper"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "ground" / "floor.py").write_text("def f():\n    import upper\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_packages = ["ground", "upper"]\n'
        '[[tool.importlinter.contracts]]\nname = "c"\ntype = "forbidden"\n'
        'source_modules = ["ground"]\nforbidden_modules = ["upper"]\n'
    )
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "1 broken" in done.stdout


def test_contracts_cover_every_member(members, root_config):
    rules = root_config["tool"]["importlinter"]
    everyone = {member.package for member in members}
    packages = everyone - {"shared_kernels", "tenfold"}
    assert set(rules["root_packages"]) == everyone
    forbidden = {
        (source, target)
        for contract in rules["contracts"]
        if contract["type"] == "forbidden"
        for source in contract["source_modules"]
        for target in contract["forbidden_modules"]
    }
    for package in packages:
        assert ("shared_kernels", package) in forbidden
        assert (package, "tenfold") in forbidden
    assert ("shared_kernels", "tenfold") in forbidden
    if len(packages) > 1:
        independent = [c for c in rules["contracts"] if c["type"] == "independence"]
        assert packages in [set(c["modules"]) for c in independent]
