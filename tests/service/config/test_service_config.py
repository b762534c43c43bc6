"""Configuration: what can be, and clear refusals of what cannot."""

import pytest

from ferryman_service.config.service_config import (
    HELP,
    RANGES,
    ComputeChoice,
    ConfigMistakes,
    Device,
    ServiceConfig,
    flag_of,
    variable_of,
)


def test_only_loopback_is_served_by_default():
    config = ServiceConfig()
    assert {config.host, config.metrics_host, config.probe_host} == {"127.0.0.1"}


def test_the_defaults_are_within_their_ranges_and_every_number_has_one():
    numbers = {name for name in HELP if type(getattr(ServiceConfig(), name)) in (int, float)}
    assert set(RANGES) == numbers


def test_names_of_flags_and_variables():
    assert (flag_of("max_connection_age_s"), variable_of("data_dir")) == ("--max-connection-age-s", "FERRYMAN_DATA_DIR")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"port": 70_000}, "--port is 70000, must be from 0 to 65535"),
        ({"translation_threads": 257}, "--translation-threads is 257, must be from 0 to 256"),
        ({"model_memory_mib": -1}, "--model-memory-mib is -1"),
        ({"worker_nice": 20}, "--worker-nice is 20, must be from 0 to 19"),
        ({"grace_s": float("nan")}, "--grace-s is nan"),
        ({"max_corpus_bytes": 2**50 + 1}, "--max-corpus-bytes is 1.12589990684262e.15|1125899906842625"),
        ({"roles": frozenset()}, "--roles must name"),
        ({"processes_per_run": 9}, "--processes-per-run is 9, must not exceed --max-processes-per-run, which is 8"),
        ({"worker_silence_s": 4}, "--worker-silence-s is 4, must be from 5 to 86400"),
        ({"device": Device.CPU, "compute_type": ComputeChoice.FP16}, "needs CUDA; on a CPU use fp32 or int8"),
        ({"device": Device.CUDA, "compute_type": ComputeChoice.INT8}, "needs a CPU; on CUDA use fp16"),
        ({"device": Device.CUDA, "compute_type": ComputeChoice.FP32}, "needs a CPU; on CUDA use fp16"),
    ],
)
def test_impossible_configuration_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ServiceConfig(**fields)


def test_credentials_in_the_trace_endpoint_are_refused_and_not_repeated():
    with pytest.raises(ConfigMistakes) as caught:
        ServiceConfig(trace_endpoint="http://me:geheim@localhost:4317")
    [mistake] = caught.value.mistakes
    assert "OTEL_EXPORTER_OTLP_HEADERS" in mistake.text
    assert "geheim" not in mistake.text


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigMistakes) as caught:
        ServiceConfig(port=-1, grace_s=-1, roles=frozenset(), processes_per_run=9)
    assert [mistake.options for mistake in caught.value.mistakes] == [
        ("port",),
        ("grace_s",),
        ("roles",),
        ("processes_per_run", "max_processes_per_run"),
    ]
