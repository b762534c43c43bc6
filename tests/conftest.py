"""How the tests share a machine; and a small random model and its bundle, exported once for all tests that read it."""

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

import ferryman_service  # noqa: F401 (it turns ONNX Runtime's telemetry off, before a test imports that)

# Threads cost the tests' tiny tensors more than they bring, and beside another busy process the threads of a parallel
# loop wait, spinning, for the one that has no core. OpenMP reads this once, when torch is imported; programs that a
# test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# HYPOTHESIS_PROFILE chooses the number of examples of a property test. An example may take long on a busy machine.
for _name, _max_examples in {"dev": 10, "ci": 100, "soak": 1000}.items():
    settings.register_profile(
        _name, max_examples=_max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
_default_profile = "soak" if os.environ.get("FERRYMAN_SOAK") else "ci"
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or _default_profile)

_UMASK = os.umask(0o022)
os.umask(_UMASK)

_FIRST = ("tests/system/", "tests/service/training/", "tests/service/search/")
"""What takes longest, so that no process is left with it at the end."""


def pytest_collection_modifyitems(items):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in _FIRST])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A log line may name a file whose name is not UTF-8; pytest-xdist sends reports as UTF-8."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _denormals_as_before():
    """Training flushes denormal numbers to zero, for its whole process: no test may leave that to the next one."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _umask_as_before():
    """A service sets the umask of its process; one that several tests share has done so before the first of them."""
    os.umask(_UMASK)
    yield
    os.umask(_UMASK)


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory):
    from tests.fakes.random_model import random_trained_model, small_recipe

    return random_trained_model(tmp_path_factory.mktemp("trained"), small_recipe())


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory, trained_model):
    from ferryman_service.training.export import OnnxExporter
    from tests.fakes.random_model import some_lineage

    folder = tmp_path_factory.mktemp("bundle")
    OnnxExporter().export(trained_model, some_lineage(trained_model.recipe), folder)
    return folder
