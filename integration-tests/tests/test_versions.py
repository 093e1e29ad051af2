"""All members are released together and ask for each other's right versions."""

from importlib.metadata import version

from packaging.requirements import Requirement
from packaging.version import Version


def test_versions_are_equal(members):
    assert len({member.project["version"] for member in members}) == 1


def test_installed_version_is_the_one_in_the_pyproject(member):
    assert version(member.name) == member.project["version"]


def test_bounds_on_each_other_are_the_current_minor_series(member, members):
    current = Version(member.project["version"])
    lower, upper = Version(f"{current.major}.{current.minor}"), None
    upper = Version(f"{current.major}.{current.minor + 1}")
    ours = {other.name for other in members}
    listed = member.project["dependencies"] + [
        line for lines in member.project.get("optional-dependencies", {}).values() for line in lines
    ]
    needed = [r for r in map(Requirement, listed) if r.name in ours - {member.name}]
    if member.name != "shared-kernels":
        assert "shared-kernels" in {r.name for r in needed}
    for requirement in needed:
        bounds = {(s.operator, Version(s.version)) for s in requirement.specifier}
        assert bounds == {(">=", lower), ("<", upper)}, str(requirement)


def test_no_dependency_is_pinned_exactly(member):
    for line in member.project["dependencies"]:
        operators = {s.operator for s in Requirement(line).specifier}
        assert not operators & {"==", "==="}, line


def test_triton_is_left_to_torch(member):
    # torch's Linux wheels pin the triton they were built with; naming it can only conflict.
    assert "triton" not in {Requirement(line).name for line in member.project["dependencies"]}


def test_python_floor_is_the_same(members):
    assert {member.project["requires-python"] for member in members} == {">=3.11"}


def test_licence_is_stated_and_shipped(member, root):
    assert member.project["license"] == "Apache-2.0"
    assert member.project["license-files"] == ["LICENSE"]
    assert (member.folder / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()
    # A licence classifier beside an SPDX expression is refused by package indexes.
    assert not [c for c in member.project["classifiers"] if c.startswith("License ::")]


def test_build_backend_is_the_same(members):
    assert {member.build["build-backend"] for member in members} == {"uv_build"}


def test_member_is_complete(member):
    package = member.folder / "src" / member.package
    for path in ("README.md", "CHANGELOG.md"):
        assert (member.folder / path).is_file(), path
    for path in ("__init__.py", "py.typed"):
        assert (package / path).is_file(), path


def test_addresses_lead_to_https(member):
    for name, url in member.project.get("urls", {}).items():
        assert url.startswith("https://"), name


def test_workspace_sources_name_every_member(members, root_config):
    sources = root_config["tool"]["uv"]["sources"]
    assert sources == {member.name: {"workspace": True} for member in members}
