"""The tools themselves."""

import pytest

from tests.ops.conftest import run

pytestmark = pytest.mark.ops


def test_helm_and_kubectl_run(helm_and_kubectl):
    helm, kubectl = helm_and_kubectl
    assert "v4" in run([helm, "version", "--short"])
    assert "kustomize" in run([kubectl, "--help"]).lower()
