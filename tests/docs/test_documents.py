"""README, docs/api.md and docs/clients.md run as a reader would run them, against the real service.

The service is the one that the README starts. Its quickstart publishes the model that the other documents use.
"""

from __future__ import annotations

import pytest

from tests.docs.markdown import commands_of, unmarked
from tests.docs.sessions import SERVE, documented_service, run_document

pytestmark = pytest.mark.ops


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    [start] = [
        command
        for block in unmarked("README.md")
        if block.language == "console"
        for command in commands_of(block)
        if command.text.startswith("ferryman-service")
    ]
    assert start.text == SERVE
    with documented_service(tmp_path_factory.mktemp("reader") / "ferryman") as service:
        yield service


@pytest.fixture(scope="module")
def quickstart(service):
    """The service after a reader has gone through the README."""
    run_document("README.md", service)
    return service


def test_readme_does_what_it_promises(quickstart):
    assert (quickstart.clone / "ferryman-data").is_dir()


@pytest.mark.parametrize("document", ["docs/api.md", "docs/clients.md"])
def test_guide_does_what_it_promises(document, quickstart):
    run_document(document, quickstart)
