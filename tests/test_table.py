"""A table finds its rows in a folder or by registration, and helps with a name that it does not have."""

from __future__ import annotations

import sys

import pytest

from ffn2moe.table import Table, UnknownName


@pytest.fixture
def fruits(tmp_path, monkeypatch):
    package = tmp_path / "fruits"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "apple.py").write_text("ROW = 'red'\n")
    (package / "pear.py").write_text("raise RuntimeError('imported')\n")
    (package / "_helper.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield Table("fruit", package="fruits")
    for name in [name for name in sys.modules if name.split(".")[0] == "fruits"]:
        del sys.modules[name]


def test_names_come_from_the_folder_without_importing_a_row(fruits):
    assert fruits.names() == ("apple", "pear")
    assert "pear" in fruits
    assert fruits.require("pear") == "pear"
    with pytest.raises(RuntimeError, match="imported"):
        fruits["pear"]


def test_a_row_is_found_in_a_file_and_by_registration(fruits):
    assert fruits["apple"] == "red"
    fruits.register("fig", "blue")
    assert fruits["fig"] == fruits.get("fig") == "blue"
    assert fruits.get("kiwi") is None
    assert fruits.names() == ("apple", "fig", "pear")
    fruits.forget("fig")
    assert "fig" not in fruits


def test_a_new_file_is_a_new_row(fruits, tmp_path):
    fruits.names()
    (tmp_path / "fruits" / "plum.py").write_text("ROW = 'purple'\n")
    assert "plum" in fruits


def test_an_unknown_name_suggests_the_nearest_and_lists_all(fruits):
    with pytest.raises(UnknownName, match=r"unknown fruit 'aple'; did you mean 'apple'\? known: apple, pear"):
        fruits["aple"]
    with pytest.raises(ValueError, match=r"unknown fruit 'zzz'; known: apple, pear"):
        fruits.require("zzz")
