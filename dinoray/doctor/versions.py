"""The installed packages against the ranges that dinoray is made for (pyproject.toml)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dinoray.doctor.findings import Finding

SHOWN = ("dinoray", "torch", "ray", "zarr", "pyarrow")


def check_versions(requires: list[str] | None = None, requires_python: str | None = None,
                   version: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """One line with the main versions, and one for every package that is missing or outside its range.

    `requires` and `requires_python` default to those of the installed dinoray.
    """
    if requires is None:
        try:
            found = metadata.metadata("dinoray")
        except metadata.PackageNotFoundError:
            yield Finding("fail", "versions", "dinoray is not installed, only its files are here",
                          "pip install --constraint constraints.txt .")
            return
        requires, requires_python = metadata.requires("dinoray") or [], found["Requires-Python"]
    python = platform.python_version()
    known = {name: _version(name, version) for name in SHOWN}
    text = f"python {python}, " + ", ".join(f"{name} {number or 'missing'}" for name, number in known.items())
    bad = list(_outside(requires, version))
    if requires_python and not SpecifierSet(requires_python).contains(python, prereleases=True):
        bad.insert(0, Finding("warn", "versions", f"python {python}, made for {requires_python}", "use such a Python"))
    yield Finding("ok", "versions", text)
    yield from bad


def _version(name: str, version: Callable[[str], str]) -> str | None:
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        return None


def _outside(requires: list[str], version: Callable[[str], str]) -> Iterator[Finding]:
    for text in requires:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue  # belongs to an extra, or to another platform
        number = _version(wanted.name, version)
        if number is None:
            yield Finding("fail", "versions", f"{wanted.name} is not installed",
                          f"pip install --constraint constraints.txt '{wanted.name}{wanted.specifier}'")
        elif not wanted.specifier.contains(number, prereleases=True):
            yield Finding("warn", "versions", f"{wanted.name} {number}, made for {wanted.specifier}",
                          f"pip install --constraint constraints.txt '{wanted.name}{wanted.specifier}'")
