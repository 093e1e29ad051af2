"""Every member as a user gets it: built, installed without the workspace, imported, asked for help.

Third-party dependencies are borrowed from the current environment, so nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow


def run(*command: object, **options) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=clean, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def uv() -> list[str]:
    if found := os.environ.get("UV") or shutil.which("uv"):
        return [found]
    return [sys.executable, "-m", "uv"]


@pytest.fixture(scope="module")
def wheels(root, members, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    run(*uv(), "build", "--all-packages", "--wheel", "--offline", "--out-dir", folder, cwd=root)
    built = {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}
    assert set(built) == {member.name for member in members}
    return built


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def test_wheel_holds_what_it_should(member, wheels):
    wheel = wheels[member.name]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licences = [n for n in names if n.endswith(".dist-info/licenses/LICENSE")]
        assert len(licences) == 1
        assert b"Apache License" in archive.read(licences[0])
    source = member.folder / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix not in (".nbi", ".nbc", ".pyc")
    }
    inside = {n for n in names if ".dist-info/" not in n and not n.endswith("/")}
    assert inside == wanted
    assert f"{member.package}/py.typed" in inside
    assert not [n for n in inside if "tests" in Path(n).parts]
    assert wheel.stat().st_size < 2_000_000


@pytest.fixture(scope="module")
def install(members, wheels, tmp_path_factory):
    """Return a function: install one member and the members it needs into a venv of its own."""
    ours = {member.name for member in members}

    def closure(name: str) -> dict[str, Path]:
        found = {name: wheels[name]}
        for line in metadata(wheels[name]).get_all("Requires-Dist", []):
            requirement = Requirement(line)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if requirement.name in ours and wanted:
                version = metadata(wheels[requirement.name])["Version"]
                assert version in requirement.specifier, f"{name} cannot be installed: {line}"
                found |= closure(requirement.name)
        return found

    def install(name: str) -> Path:
        folder = tmp_path_factory.mktemp(f"venv-{name}")
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        options = ("--python", python, "--no-deps", "--offline", "--no-config")
        run(*uv(), "pip", "install", *options, *closure(name).values())
        packages = Path(
            run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        # The paths inside the borrowed folder's own .pth files are not followed, so the
        # workspace's sources stay out of sight.
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    return install


def test_wheel_works_alone(member, install, members, tmp_path):
    python = install(member.name)
    code = f"import {member.package} as p; print(p.__file__)"
    where = Path(run(python, "-c", code, cwd=tmp_path).strip())
    assert where.is_relative_to(python.parent.parent)
    if member.name != "tenfold":
        code = f"import {member.package} as p; print(p.__version__)"
        assert run(python, "-c", code, cwd=tmp_path).strip() == member.project["version"]
    for command in member.commands:
        script = python.with_name(command)
        assert member.project["version"] in run(script, "--version", cwd=tmp_path)
        assert "--help" in run(script, "--help", cwd=tmp_path)
        assert "--help" in run(python, "-m", member.package, "--help", cwd=tmp_path)
    if member.name != "tenfold":
        others = {m.package for m in members} - {member.package, "shared_kernels"}
        code = (
            f"import importlib.util as u; print([n for n in {sorted(others)!r} if u.find_spec(n)])"
        )
        assert run(python, "-c", code, cwd=tmp_path).strip() == "[]"


def test_every_module_of_the_wheel_imports(member, install, tmp_path):
    python = install(member.name)
    code = f"""
import importlib, pkgutil, {member.package} as top
for info in pkgutil.walk_packages(top.__path__, "{member.package}."):
    if info.name.rsplit(".", 1)[-1] not in ("triton", "__main__"):
        importlib.import_module(info.name)
"""
    run(python, "-c", code, cwd=tmp_path)
