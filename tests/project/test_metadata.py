"""pyproject.toml and constraints.txt agree, and two machines get the same versions."""

import re
import tomllib
from pathlib import Path

import pytest

from sparseq.cli import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OPTIONAL: dict[str, list[str]] = PROJECT["optional-dependencies"]


def canonical(requirement: str) -> str:
    """The package's name in the form in which package indexes compare names."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    return {canonical(line): line for line in found}


def direct_dependencies() -> set[str]:
    requirements = [*PROJECT["dependencies"], *(one for extra in OPTIONAL.values() for one in extra)]
    return {canonical(one) for one in requirements} - {"sparseq"}


def test_every_direct_dependency_is_pinned_and_nothing_else() -> None:
    assert set(pins()) == direct_dependencies()


@pytest.mark.parametrize("line", sorted(pins().values()))
def test_pins_are_exact_and_name_no_build(line: str) -> None:
    # A local version such as +cpu would tie the pin to one index.
    assert re.fullmatch(r"[A-Za-z0-9_-]+==[0-9]+(\.[0-9]+)*", line)


@pytest.mark.parametrize(("package", "extra"), sorted(EXTRAS.items()))
def test_the_extra_named_to_users_installs_the_package(package: str, extra: str) -> None:
    assert canonical(package) in {canonical(one) for one in OPTIONAL[extra]}


def test_all_is_every_extra_of_users() -> None:
    (requirement,) = OPTIONAL["all"]
    match = re.fullmatch(r"sparseq\[(.*)\]", requirement)
    assert match
    assert set(match[1].split(",")) == set(OPTIONAL) - {"all", "dev"}
