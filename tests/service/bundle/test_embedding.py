"""Tokens become the same numbers as in the network, in files that are mapped and not read."""

import threading

import numpy as np
import pytest

from ferryman_service.bundle.embedding import Embedding, sinusoids, write_embedding, write_int8_embedding
from ferryman_service.bundle.manifest import (
    EMBEDDING_FILE,
    EMBEDDING_INT8_FILE,
    EMBEDDING_SCALES_FILE,
    Architecture,
)
from ferryman_service.domain.translation import ComputeType
from ferryman_service.model.positions import sinusoids as sinusoids_of_the_network
from tests.fakes.random_network import random_network

VOCABULARY_SIZE, D_MODEL = 60, 32


@pytest.fixture(scope="module")
def network():
    return random_network(VOCABULARY_SIZE)


@pytest.fixture
def folder(tmp_path, network):
    weight_VD = network.embedding.weight.detach().numpy()
    write_embedding(tmp_path, weight_VD)
    write_int8_embedding(tmp_path, weight_VD)
    return tmp_path


def architecture(**changes):
    values = {"d_model": D_MODEL, "decoder_layers": 1, "heads": 4, "vocabulary_size": VOCABULARY_SIZE}
    return Architecture(**values | changes)


@pytest.mark.parametrize("d_model", [2, D_MODEL, 128, 1024])
@pytest.mark.parametrize("length", [1, 513, 4096])
def test_positions_are_the_networks(length, d_model):
    """PyTorch adds them in training, NumPy when the bundle serves, and neither layer may import the other: they must be
    the same but for the last bit, which the two libraries' sines round each in its way."""
    found_TD, trained_TD = sinusoids(length, d_model), sinusoids_of_the_network(length, d_model).numpy()
    np.testing.assert_allclose(found_TD, trained_TD, rtol=0, atol=2**-24)
    assert (found_TD == trained_TD).mean() > 0.99
    assert found_TD.dtype == np.float32


@pytest.mark.parametrize(
    ("compute_type", "tolerance"), [(ComputeType.FP32, 1e-5), (ComputeType.INT8, 0.05)], ids=["fp32", "int8"]
)
@pytest.mark.parametrize("longest", [3, 700])
def test_sources_and_rows_are_embedded_as_in_the_network(folder, network, compute_type, tolerance, longest):
    import torch

    embedding = Embedding.open(folder, compute_type, architecture())
    source_SL = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (2, longest))
    with torch.no_grad():
        wanted_SLD = network.embed(torch.from_numpy(source_SL)).numpy()
    np.testing.assert_allclose(embedding.of_sources(source_SL), wanted_SLD, atol=tolerance)
    out_RD = np.full((2, D_MODEL), np.nan, np.float32)
    for position_R in (np.array([0, longest - 1]), np.array([longest - 1, 1])):
        position_R = position_R.astype(np.int32)
        embedding.of_rows(source_SL[[0, 1], position_R], position_R, longest - 1, out_RD)
        np.testing.assert_allclose(out_RD, wanted_SLD[[0, 1], position_R], atol=tolerance)


@pytest.mark.parametrize("compute_type", [ComputeType.FP32, ComputeType.INT8])
def test_a_model_that_rotates_has_no_positions_added(folder, compute_type):
    embedding = Embedding.open(folder, compute_type, architecture(rotates=True))
    found_SLD = embedding.of_sources(np.array([[7, 7, 7]]))
    assert (found_SLD == found_SLD[:, :1]).all()
    out_RD = np.empty((2, D_MODEL), np.float32)
    embedding.of_rows(np.array([7, 7]), np.array([0, 90], np.int32), 90, out_RD)
    assert (out_RD == found_SLD[0, 0]).all()


def test_rows_and_sources_are_the_same_to_the_last_bit(folder):
    embedding = Embedding.open(folder, ComputeType.INT8, architecture())
    token_N = np.arange(VOCABULARY_SIZE)
    out_RD = np.empty((VOCABULARY_SIZE, D_MODEL), np.float32)
    embedding.of_rows(token_N, token_N.astype(np.int32), VOCABULARY_SIZE - 1, out_RD)
    np.testing.assert_array_equal(out_RD, embedding.of_sources(token_N[None])[0])


def test_several_threads_may_need_more_positions_at_once(folder):
    embedding = Embedding.open(folder, ComputeType.FP32, architecture())
    wanted_LD = sinusoids(5000, D_MODEL)
    failed = []

    def work(length):
        found_LD = embedding.of_sources(np.zeros((1, length), np.int64))[0]
        plain_D = embedding.of_sources(np.zeros((1, 1), np.int64))[0, 0] - wanted_LD[0]
        if not np.allclose(found_LD, wanted_LD[:length] + plain_D, atol=1e-5):
            failed.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in range(600, 5000, 400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_sizes_are_those_of_the_arrays(folder):
    sizes = {
        one: Embedding.open(folder, one, architecture()).size_bytes for one in (ComputeType.FP32, ComputeType.INT8)
    }
    assert sizes == {
        ComputeType.FP32: 4 * VOCABULARY_SIZE * D_MODEL,
        ComputeType.INT8: VOCABULARY_SIZE * D_MODEL + 4 * VOCABULARY_SIZE,
    }


@pytest.mark.parametrize(
    ("name", "compute_type"),
    [
        (EMBEDDING_FILE, ComputeType.FP32),
        (EMBEDDING_INT8_FILE, ComputeType.INT8),
        (EMBEDDING_SCALES_FILE, ComputeType.INT8),
    ],
)
def test_a_file_of_another_shape_type_or_kind_is_refused(folder, name, compute_type):
    array = np.load(folder / name)
    for other in (array[:-1], array.astype(np.float64), array[None]):
        np.save(folder / name, other)
        with pytest.raises(ValueError, match=name):
            Embedding.open(folder, compute_type, architecture())
    np.save(folder / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"(?i)pickle|object"):
        Embedding.open(folder, compute_type, architecture())
