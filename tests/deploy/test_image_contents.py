"""What the images would hold is told from the Dockerfile, the constraints and what is installed."""

from importlib.metadata import Distribution

import pytest
from packaging.version import Version

from deploy import image_contents
from deploy.image_contents import ROOT, Contents, Package, Resolver, contents_of, problems_of, read_constraints, report

PRODUCT = Package(name="ferryman", version="0.1.0", size_bytes=1_000_000)
PROJECT = {
    "dependencies": ["Wire.Codec>=1"],
    "optional-dependencies": {"server": ["engine[fast]>=2; python_version >= '3'", "absent; python_version < '3'"]},
}


class FakeDistribution(Distribution):
    """A package that is installed without files."""

    def __init__(self, name, version, requires=()):
        self._lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requires)]

    def read_text(self, filename):
        return "\n".join(self._lines) if filename == "METADATA" else None

    def locate_file(self, path):
        raise AssertionError("nothing is read")


def resolver(**installed):
    return Resolver(PROJECT, installed.get)


def engine(version="2.0"):
    return FakeDistribution("engine", version, ["kernels; extra == 'fast'", "docs; extra == 'docs'"])


def test_requirements_are_followed_with_their_extras_and_markers():
    found = resolver(engine=engine()).names({"server"})
    assert set(found) == {"wire-codec", "engine", "kernels"}


def test_what_is_not_installed_here_is_named_without_a_size():
    pinned = {"wire-codec": Version("1"), "engine": Version("2"), "kernels": Version("3")}
    contents = contents_of("gpu", {"server"}, resolver(engine=engine()), pinned, PRODUCT)
    assert contents.problems == []
    assert set(contents.unknown) == {"wire-codec", "kernels"}
    assert "not computed here: kernels, wire-codec" in next(iter(report(contents, None, False)))


def test_what_is_not_pinned_or_of_another_version_is_a_problem():
    pinned = {"engine": Version("2.1"), "kernels": Version("3")}
    contents = contents_of("cpu", {"server"}, resolver(engine=engine()), pinned, PRODUCT)
    assert contents.problems == [
        "engine is pinned to 2.1, installed here is 2.0: run make setup",
        "wire-codec is not in constraints.txt",
    ]


def test_a_local_build_of_the_pinned_version_will_do():
    pinned = {"wire-codec": Version("1"), "engine": Version("2.0"), "kernels": Version("3")}
    contents = contents_of("cpu", {"server"}, resolver(engine=engine("2.0+cpu")), pinned, PRODUCT)
    assert contents.problems == []


@pytest.mark.parametrize(("size_bytes", "problems"), [(450_000_000, 0), (450_000_001, 1), (None, 1)])
def test_a_budget_holds_only_for_what_was_measured(size_bytes, problems):
    package = Package(name="engine", version="2", size_bytes=size_bytes)
    contents = Contents(target="serving-cpu", packages=[package], problems=[])
    assert len(list(problems_of(contents, 450))) == problems


def test_the_constraints_are_read_by_canonical_name():
    assert read_constraints("Wire_Codec==1.0 # why\n\n") == {"wire-codec": Version("1.0")}


def test_a_stage_without_extras_is_refused():
    with pytest.raises(ValueError, match="builder-cpu"):
        image_contents.extras_of_targets("FROM builder AS builder-cpu\nRUN pip install .\nFROM x AS y\n")


@pytest.fixture(scope="module")
def contents():
    return {each.target: each for each in image_contents.all_contents(ROOT)}


def test_every_target_is_listed(contents):
    assert set(contents) == {"serving-cpu", "cpu", "cuda"}
    assert not any(each.problems for each in contents.values())


def test_the_serving_image_holds_no_library_of_training(contents):
    names = {package.name for package in contents["serving-cpu"].packages}
    assert {"onnxruntime", "grpcio", "numpy", "opentelemetry-sdk"} <= names
    assert not names & {"torch", "sympy", "onnx", "sacrebleu", "safetensors", "typer"}
    assert {"torch", "onnx", "onnxruntime"} <= {package.name for package in contents["cpu"].packages}


def test_the_build_for_cpus_is_not_taken_for_the_one_for_gpus(contents):
    assert {"torch", "onnxruntime-gpu"} <= set(contents["cuda"].unknown)


def test_the_budget_is_kept(capsys):
    assert image_contents.main([]) == 0
    assert "serving-cpu: " in capsys.readouterr().out


def test_above_the_budget_the_command_fails(capsys):
    assert image_contents.main(["--packages", "--budget-mb", "1"]) == 1
    captured = capsys.readouterr()
    assert "above the budget of 1 MB" in captured.err
    assert "onnxruntime " in captured.out
