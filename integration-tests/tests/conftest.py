"""What several of these tests need: the workspace's members, read from their pyprojects."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Member:
    """A project of the workspace."""

    folder: Path
    project: dict[str, Any]
    build: dict[str, Any]

    @property
    def name(self) -> str:
        return self.project["name"]

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    @property
    def commands(self) -> list[str]:
        return list(self.project.get("scripts", {}))


def read_members() -> list[Member]:
    patterns = read_root()["tool"]["uv"]["workspace"]["members"]
    found = []
    for path in sorted(path for p in patterns for path in ROOT.glob(f"{p}/pyproject.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        found.append(Member(path.parent, table["project"], table["build-system"]))
    return found


def read_root() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "member" in metafunc.fixturenames:
        metafunc.parametrize("member", read_members(), ids=lambda member: member.name)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def root_config() -> dict[str, Any]:
    return read_root()


@pytest.fixture(scope="session")
def members() -> list[Member]:
    return read_members()
