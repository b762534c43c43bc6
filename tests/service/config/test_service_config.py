"""Configuration: flags, environment, defaults, and clear refusals."""

import argparse
from pathlib import Path

import pytest

from ferryman_service.config.service_config import Device, Role, ServiceConfig, add_arguments, config_from


def parse(*argv, **environment):
    parser = argparse.ArgumentParser()
    add_arguments(parser, environment)
    return config_from(parser.parse_args(argv))


def test_nothing_set_gives_the_defaults():
    assert parse() == ServiceConfig()
    assert ServiceConfig().host == "127.0.0.1"


def test_flags_win_over_the_environment():
    config = parse("--port", "7", FERRYMAN_PORT="8", FERRYMAN_DATA_DIR="/data", FERRYMAN_REFLECTION="off")
    assert (config.port, config.data_dir, config.reflection) == (7, Path("/data"), False)
    assert parse("--reflection", FERRYMAN_REFLECTION="off").reflection


def test_roles_and_device():
    assert parse("--roles", "translation").roles == {Role.TRANSLATION}
    assert parse(FERRYMAN_ROLES="training, translation").roles == set(Role)
    assert parse("--device", "cuda").device is Device.CUDA


@pytest.mark.parametrize(
    ("argv", "environment", "word"),
    [
        (["--port", "x"], {}, "--port"),
        (["--roles", "cooking"], {}, "--roles"),
        ([], {"FERRYMAN_PORT": "x"}, "FERRYMAN_PORT"),
        ([], {"FERRYMAN_REFLECTION": "perhaps"}, "FERRYMAN_REFLECTION"),
    ],
)
def test_what_cannot_be_read_is_named(argv, environment, word, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv, **environment)
    assert caught.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--port", "70000"], ["--translation-threads", "0"], ["--model-memory-mib", "-1"], ["--roles", ","]]
)
def test_what_cannot_work_is_refused(argv):
    with pytest.raises(ValueError, match=argv[0]):
        parse(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cpu", "--compute-type", "fp16"], "is for CUDA; on a CPU use fp32 or int8"),
        (["--device", "cuda", "--compute-type", "int8"], "is for a CPU; on CUDA use fp16"),
        (["--device", "cuda", "--compute-type", "fp32"], "is for a CPU; on CUDA use fp16"),
    ],
)
def test_arithmetic_that_the_device_has_not_is_refused(argv, words):
    with pytest.raises(ValueError, match=words):
        parse(*argv)
