"""Options that are 0 for automatic."""

import pytest

from ferryman_service.config.automatic import automatic_lines, decoding_threads, queue_tokens, with_automatic
from ferryman_service.config.resources import Machine, Usable
from ferryman_service.config.service_config import ServiceConfig

GIB = 2**30


def machine(cpus=2, memory_bytes=16 * GIB):
    memory = None if memory_bytes is None else Usable(value=memory_bytes, source="MemTotal")
    return Machine(cpus=Usable(value=cpus, source="affinity"), memory=memory)


def test_two_cpus_give_the_former_defaults():
    config = with_automatic(ServiceConfig(), machine(), on_gpu=False)
    assert (config.translation_threads, config.queue_tokens) == (2, 262_144)


@pytest.mark.parametrize(
    ("cpus", "memory_bytes", "threads"),
    [
        (1, 16 * GIB, 1),
        (64, 256 * GIB, 64),
        (64, 4 * GIB, 8),
        (2, GIB, 2),
        (2, GIB - 1, 1),
        (2, 2**20, 1),
        (64, None, 64),
        (1024, None, 256),
    ],
)
def test_decoding_threads_fit_cpus_and_memory(cpus, memory_bytes, threads):
    assert decoding_threads(machine(cpus, memory_bytes)) == threads


@pytest.mark.parametrize(("threads", "tokens"), [(1, 262_144), (2, 262_144), (3, 393_216), (64, 8_388_608)])
def test_queue_grows_with_the_decoding_threads(threads, tokens):
    assert queue_tokens(threads) == tokens


def test_queue_follows_the_threads_that_an_operator_sets():
    config = with_automatic(ServiceConfig(translation_threads=8), machine(), on_gpu=False)
    assert (config.translation_threads, config.queue_tokens) == (8, 8 * 131_072)


def test_models_may_take_half_of_the_usable_memory():
    assert with_automatic(ServiceConfig(), machine(memory_bytes=3 * GIB), on_gpu=False).model_memory_mib == 1536
    assert with_automatic(ServiceConfig(), machine(memory_bytes=1), on_gpu=False).model_memory_mib == 1


def test_models_and_caches_have_no_limit_on_a_gpu_or_with_unknown_memory():
    for where, on_gpu in ((machine(), True), (machine(memory_bytes=None), False)):
        config = with_automatic(ServiceConfig(), where, on_gpu=on_gpu)
        assert (config.model_memory_mib, config.cache_memory_mib) == (0, 0)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_values_of_the_operator_stay(on_gpu):
    config = ServiceConfig(translation_threads=3, queue_tokens=5, cache_memory_mib=6, model_memory_mib=7)
    assert with_automatic(config, machine(), on_gpu=on_gpu) == config
    assert not list(automatic_lines(config, machine()))


def test_lines_tell_what_automatic_options_become():
    assert list(automatic_lines(ServiceConfig(), machine(4, 4 * GIB))) == [
        "automatic translation_threads: 4",
        "automatic queue_tokens: 524288",
        "automatic cache_memory_mib: 2048 (on a GPU: no limit)",
        "automatic model_memory_mib: 2048 (on a GPU: no limit)",
    ]
    lines = list(automatic_lines(ServiceConfig(), machine(memory_bytes=None)))
    assert lines[-1] == "automatic model_memory_mib: no limit (on a GPU: no limit)"
