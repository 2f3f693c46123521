from pathlib import Path

import pytest

from sparseq import resources
from sparseq.resources import resource_path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package folder, with a folder around it that has a recipe of its own."""
    folder = tmp_path / "around" / "sparseq"
    folder.mkdir(parents=True)
    (folder.parent / "recipes").mkdir()
    (folder.parent / "recipes" / "outer.yaml").touch()
    monkeypatch.setattr(resources, "_PACKAGE", folder)
    return folder


def test_clone_is_read_beside_the_package(package: Path) -> None:
    (package.parent / "pyproject.toml").touch()
    assert resource_path("recipes/outer.yaml") == package.parent / "recipes" / "outer.yaml"


def test_package_comes_first(package: Path) -> None:
    (package.parent / "pyproject.toml").touch()
    (package / "recipes").mkdir()
    (package / "recipes" / "outer.yaml").touch()
    assert resource_path("recipes/outer.yaml") == package / "recipes" / "outer.yaml"


def test_site_packages_is_not_a_clone(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'recipes/outer.yaml' was found neither"):
        resource_path("recipes/outer.yaml")


def test_a_missing_file_lists_its_neighbours(package: Path) -> None:
    (package / "recipes").mkdir()
    (package / "recipes" / "inner.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"'recipes/iner.yaml'.*\['inner.yaml'\]"):
        resource_path("recipes/iner.yaml")


@pytest.mark.parametrize("name", ["", "/etc/hosts", "../recipes", "recipes/../../x"])
def test_a_path_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="relative path without"):
        resource_path(name)


@pytest.mark.parametrize("name", ["recipes", "model_card.md"])
def test_what_travels_exists(name: str) -> None:
    assert resource_path(name).exists()
