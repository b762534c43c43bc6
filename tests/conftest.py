"""A small random model and its bundle, exported once for all tests that read it."""

import pytest


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
