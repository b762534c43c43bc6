"""Which Python packages each target of the Dockerfile would hold, and how much room they take: `make image-contents`.

Nothing is built or downloaded. What a target installs is read from the Dockerfile, which packages that brings from
pyproject.toml and the metadata of what is installed here, and versions from constraints.txt. The size of a package is
that of its files here, bytecode included. Packages that only other builds bring, such as the libraries of CUDA, are
named without a size. Exits with 1 if a target is over its budget, or holds what its constraints do not pin.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT: Final = Path(__file__).parents[1]
PRODUCT: Final = "ferryman"
BUDGETS_MB: Final[Mapping[str, float]] = {"serving-cpu": 450}
_BYTES_PER_MB: Final = 10**6
_STAGE = re.compile(r"^FROM builder AS builder-(?P<target>\S+)$(?P<body>.*?)(?=^FROM |\Z)", re.MULTILINE | re.DOTALL)
_EXTRAS = re.compile(r'"\.\[(?P<extras>[a-z,]+)\]"')

FindDistribution = Callable[[str], Distribution | None]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package of a target; `size_bytes` is None where it cannot be told here."""

    name: str
    version: str
    size_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a target holds, the largest first, and what is wrong with it."""

    target: str
    packages: Sequence[Package]
    problems: Sequence[str]

    @property
    def known_bytes(self) -> int:
        """The sum of the sizes that are known."""
        return sum(package.size_bytes or 0 for package in self.packages)

    @property
    def unknown(self) -> Sequence[str]:
        """The names of the packages whose size is not known."""
        return [package.name for package in self.packages if package.size_bytes is None]


def extras_of_targets(dockerfile: str) -> dict[str, frozenset[str]]:
    """Return the extras that each target installs."""
    targets = {}
    for stage in _STAGE.finditer(dockerfile):
        found = _EXTRAS.search(stage["body"])
        if found is None:
            raise ValueError(f"the stage builder-{stage['target']} of the Dockerfile installs no extras of the product")
        targets[stage["target"]] = frozenset(found["extras"].split(","))
    return targets


def read_constraints(text: str) -> dict[str, Version]:
    """Return the version that is pinned of each package."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def installed(name: str) -> Distribution | None:
    """Return what is installed here under the name."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


class Resolver:
    """Follows the requirements of the product through what is installed here."""

    def __init__(self, project: Mapping[str, object], find: FindDistribution = installed) -> None:
        """Store; `project` is the table of pyproject.toml, which is newer than the metadata of an editable install."""
        self._project = project
        self._find = find

    def names(self, extras: Iterable[str]) -> dict[str, Distribution | None]:
        """Return, by name, all that the product needs with these extras; None where it is not installed here."""
        found: dict[str, Distribution | None] = {}
        seen: set[tuple[str, frozenset[str]]] = set()
        waiting = [(PRODUCT, frozenset(extras))]
        while waiting:
            name, wanted = waiting.pop()
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            if name != PRODUCT:
                found[name] = self._find(name)
            for text in self._requirements(name, found.get(name), wanted):
                requirement = Requirement(text)
                if _applies(requirement, wanted):
                    waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
        return found

    def _requirements(self, name: str, found: Distribution | None, extras: frozenset[str]) -> Iterable[str]:
        if name != PRODUCT:
            return (found.requires or ()) if found is not None else ()
        optional = self._project["optional-dependencies"]
        always = self._project["dependencies"]
        assert isinstance(optional, dict) and isinstance(always, list), "pyproject.toml has both"
        return [*always, *(text for extra in sorted(extras) for text in optional[extra])]


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def contents_of(
    target: str, extras: Iterable[str], resolver: Resolver, pinned: Mapping[str, Version], product: Package
) -> Contents:
    """Return what a target holds."""
    wanted = frozenset(extras)
    packages, problems = [product], []
    for name, found in resolver.names(wanted).items():
        if name not in pinned:
            problems.append(f"{name} is not in constraints.txt")
            continue
        version = pinned[name]
        if found is not None and _public(found.version) != _public(str(version)):
            problems.append(f"{name} is pinned to {version}, installed here is {found.version}: run make setup")
        measured = found is not None and not ("gpu" in wanted and name == "torch")  # here it may be the build for CPUs
        size = size_bytes(found) if found is not None and measured else None
        packages.append(Package(name=name, version=str(version), size_bytes=size))
    packages.sort(key=lambda package: (-(package.size_bytes or 0), package.name))
    return Contents(target=target, packages=packages, problems=sorted(problems))


def _public(version: str) -> Version:
    """Return the version without its local part, which names a build: 2.13.0+cpu is 2.13.0."""
    return Version(Version(version).public)


def size_bytes(found: Distribution) -> int:
    """Return the size of the files that the package has installed."""
    paths = (Path(str(file.locate())) for file in found.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def product_package(project: Mapping[str, object], folders: Iterable[Path]) -> Package:
    """Return the product itself, which is installed here from its folders and has no list of files."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return Package(name=PRODUCT, version=str(project["version"]), size_bytes=size)


def report(contents: Contents, budget_mb: float | None, every_package: bool) -> Iterator[str]:
    """Yield the lines that tell of a target."""
    budget = f", budget {budget_mb:g} MB" if budget_mb is not None else ""
    unknown = contents.unknown
    rest = f", and what is not computed here: {', '.join(unknown)} with all that they bring" if unknown else ""
    total_mb = contents.known_bytes / _BYTES_PER_MB
    yield f"{contents.target}: {len(contents.packages)} packages, {total_mb:.0f} MB{budget}{rest}"
    for package in contents.packages if every_package else ():
        size = f"{package.size_bytes / _BYTES_PER_MB:9.1f} MB" if package.size_bytes is not None else "not computed"
        yield f"  {package.name:42}{package.version:18}{size:>12}"


def problems_of(contents: Contents, budget_mb: float | None) -> Iterator[str]:
    """Yield what is wrong with a target."""
    yield from contents.problems
    if budget_mb is not None and contents.unknown:
        yield f"the budget cannot be checked, these are not installed here: {', '.join(contents.unknown)}"
    if budget_mb is not None and contents.known_bytes > budget_mb * _BYTES_PER_MB:
        known_mb = contents.known_bytes / _BYTES_PER_MB
        yield f"{known_mb:.0f} MB of Python packages are above the budget of {budget_mb:g} MB"


def all_contents(root: Path) -> list[Contents]:
    """Return what every target of a checkout's Dockerfile holds."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = read_constraints((root / "constraints.txt").read_text(encoding="utf-8"))
    product = product_package(project, (root / "client", root / "service"))
    resolver = Resolver(project)
    targets = extras_of_targets((root / "Dockerfile").read_text(encoding="utf-8"))
    return [contents_of(target, extras, resolver, pinned, product) for target, extras in targets.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the targets hold; 1 if something is wrong with one."""
    parser = argparse.ArgumentParser(description="What the images would hold, and their budgets.")
    parser.add_argument("--packages", action="store_true", help="name every package")
    parser.add_argument("--budget-mb", type=float, help="another budget of serving-cpu")
    arguments = parser.parse_args(argv)
    budgets = dict(BUDGETS_MB)
    if arguments.budget_mb is not None:
        budgets["serving-cpu"] = arguments.budget_mb
    failed = False
    for contents in all_contents(ROOT):
        budget_mb = budgets.get(contents.target)
        print(*report(contents, budget_mb, arguments.packages), sep="\n")
        for problem in problems_of(contents, budget_mb):
            failed = True
            print(f"{contents.target}: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
