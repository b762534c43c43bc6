"""Where values come from: flags, environment, files of single values, the configuration file; and every mistake."""

import argparse
from pathlib import Path

import pytest

from ferryman_service.config.service_config import HELP, ConfigMistakes, Device, Role, ServiceConfig
from ferryman_service.config.sources import add_arguments, load, plain_value, read_value, toml_value


@pytest.fixture
def settings_of(tmp_path):
    """Load what flags, environment and the text of a configuration file say."""

    def parse(*argv, file=None, **environment):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        if file is not None:
            path = tmp_path / "ferryman.toml"
            path.write_text(file, encoding="utf-8")
            environment["FERRYMAN_CONFIG"] = str(path)
        return load(parser.parse_args(argv), environment)

    return parse


@pytest.fixture
def mistakes_of(settings_of):
    def parse(*argv, **options):
        with pytest.raises(ConfigMistakes) as caught:
            settings_of(*argv, **options)
        return [mistake.text for mistake in caught.value.mistakes]

    return parse


def test_nothing_set_gives_the_defaults(settings_of):
    settings = settings_of()
    assert settings.config == ServiceConfig()
    assert {setting.source for setting in settings.settings} == {"default"}
    assert settings.warnings == ()


def test_flag_over_environment_over_file_over_default(settings_of):
    file = 'port = 1\nmetrics_port = 1\ngrace_s = 1\ndata_dir = "/file"\n'
    settings = settings_of("--port", "3", file=file, FERRYMAN_PORT="2", FERRYMAN_METRICS_PORT="2")
    config = settings.config
    assert (config.port, config.metrics_port, config.grace_s, config.heartbeat_s) == (3, 2, 1.0, 10.0)
    assert config.data_dir == Path("/file")
    sources = {setting.option: setting.source for setting in settings.settings}
    assert (sources["port"], sources["metrics_port"], sources["heartbeat_s"]) == (
        "--port",
        "FERRYMAN_METRICS_PORT",
        "default",
    )
    assert sources["grace_s"].endswith("ferryman.toml: grace_s")


def test_the_file_that_a_flag_names_wins_over_the_one_of_the_environment(settings_of, tmp_path):
    (tmp_path / "other.toml").write_text("port = 2")
    assert settings_of("--config", str(tmp_path / "other.toml"), file="port = 1").config.port == 2


def test_every_kind_of_value(settings_of):
    file = 'roles = ["translation"]\nreflection = false\ndevice = "cuda"\nlog_level = "debug"\ngrace_s = 5\n'
    from_file = settings_of(file=file).config
    from_environment = settings_of(
        FERRYMAN_ROLES="translation",
        FERRYMAN_REFLECTION="off",
        FERRYMAN_DEVICE="cuda",
        FERRYMAN_LOG_LEVEL="debug",
        FERRYMAN_GRACE_S="5",
    ).config
    from_flags = settings_of(
        *("--roles", "translation", "--no-reflection", "--device", "cuda", "--log-level", "debug", "--grace-s", "5")
    ).config
    assert from_file == from_environment == from_flags
    assert (from_file.roles, from_file.reflection, from_file.device) == ({Role.TRANSLATION}, False, Device.CUDA)
    assert (from_file.log_level, from_file.grace_s) == ("DEBUG", 5.0)
    assert settings_of(FERRYMAN_ROLES="training, translation").config.roles == set(Role)
    assert settings_of("--reflection", FERRYMAN_REFLECTION="off").config.reflection


@pytest.mark.parametrize("option", HELP)
def test_shown_configuration_is_read_back(option):
    default = getattr(ServiceConfig(), option)
    assert read_value(option, plain_value(default)) == default
    assert type(read_value(option, plain_value(default))) is type(default)


def test_a_value_from_a_file_of_its_own(settings_of, tmp_path):
    (tmp_path / "host").write_text("10.0.0.1\n")
    settings = settings_of(FERRYMAN_HOST_FILE=str(tmp_path / "host"))
    assert settings.config.host == "10.0.0.1"
    assert {setting.option: setting.source for setting in settings.settings}["host"] == "FERRYMAN_HOST_FILE"


def test_no_variable_means_two_things():
    assert not [option for option in HELP if option.endswith("_file") and option.removesuffix("_file") in HELP]
    assert "config" not in HELP


def test_mistakes_of_all_sources_come_together_each_with_its_source(mistakes_of, tmp_path):
    file = 'prot = 1\nport = "x"\ndata-dir = "x"\nheartbeat_s = true\n[roles]\nx = 1\n'
    found = mistakes_of(
        *("--metrics-port", "70000", "--grace-s", "soon"),
        file=file,
        FERRYMAN_REFLECTION="perhaps",
        FERRYMAN_DEVICE="gpu",
        FERRYMAN_QUEUE_TOKENS="-1",
        FERRYMAN_HOST_FILE="/nowhere",
        FERRYMAN_MAX_SENTENCES="1",
        FERRYMAN_MAX_SENTENCES_FILE="/nowhere",
    )
    path = tmp_path / "ferryman.toml"
    assert sorted(found) == sorted(
        [
            f"{path}: unknown option prot; did you mean port?",
            f"{path}: port is 'x', must be a whole number",
            f"{path}: unknown option data-dir; did you mean data_dir?",
            f"{path}: heartbeat_s is True, must be a number",
            f"{path}: roles is {{'x': 1}}, must be training, translation, or both",
            "FERRYMAN_REFLECTION is 'perhaps', must be true or false",
            "FERRYMAN_DEVICE is 'gpu', must be one of auto, cpu, cuda",
            "FERRYMAN_HOST_FILE: /nowhere cannot be read: No such file or directory",
            "FERRYMAN_MAX_SENTENCES and FERRYMAN_MAX_SENTENCES_FILE are both set; unset one of them",
            "--grace-s is 'soon', must be a number",
            "--metrics-port is 70000, must be from 0 to 65535",
            "--queue-tokens is -1, must be from 0 to 1099511627776 (FERRYMAN_QUEUE_TOKENS)",
        ]
    )


def test_a_conflict_names_both_sources(mistakes_of):
    [text] = mistakes_of("--device", "cpu", FERRYMAN_COMPUTE_TYPE="fp16")
    assert text.endswith("(compute_type: FERRYMAN_COMPUTE_TYPE, device: --device)")


def test_a_conflict_with_what_could_not_be_read_is_not_guessed(mistakes_of):
    [text] = mistakes_of("--processes-per-run", "9", FERRYMAN_MAX_PROCESSES_PER_RUN="many")
    assert text.startswith("FERRYMAN_MAX_PROCESSES_PER_RUN")


def test_a_configuration_file_that_is_not_there_or_no_toml(mistakes_of):
    assert mistakes_of("--config", "/nowhere") == ["--config: /nowhere cannot be read: No such file or directory"]
    [text] = mistakes_of(file="port = \ngrace_s = 1")
    assert text.startswith("FERRYMAN_CONFIG: ")
    assert "line 1" in text


def test_a_byte_order_mark_before_a_file_is_no_text(settings_of, tmp_path):
    path = tmp_path / "host"
    path.write_bytes(b"\xef\xbb\xbf127.0.0.9\r\n")
    config = settings_of(file="\ufeffgrace_s = 7", FERRYMAN_HOST_FILE=str(path)).config
    assert (config.grace_s, config.host) == (7, "127.0.0.9")


def test_kubernetes_variables_of_a_service_called_ferryman_are_explained(mistakes_of):
    [text] = mistakes_of(FERRYMAN_PORT="tcp://10.0.0.1:50051")
    assert "enableServiceLinks: false" in text


def test_variables_that_mean_nothing_are_warned_of(settings_of):
    warnings = settings_of(
        FERRYMAN_PROT="1",
        FERRYMAN_SERVICE_HOST="10.0.0.1",
        FERRYMAN_PORT_50051_TCP_ADDR="10.0.0.1",
        FERRYMAN_SERVICE_PORT_GRPC="50051",
        FERRYMAN_SERVER="localhost:50051",  # the client's
        OTHER="1",
    ).warnings
    assert warnings == ("unknown variable FERRYMAN_PROT is ignored; did you mean FERRYMAN_PORT?",)


def test_effective_configuration_is_shown_as_equivalent_toml(settings_of):
    given = settings_of("--data-dir", 'a "b" \\ ü', "--no-reflection", "--grace-s", "0.25")
    again = settings_of(file="\n".join(given.lines()))
    assert again.config == given.config
    [line] = [line for line in given.lines() if line.startswith("grace_s")]
    assert line.split() == ["grace_s", "=", "0.25", "#", "--grace-s"]


def test_secrets_are_not_shown(mistakes_of):
    assert toml_value("api_token", "abc") == '"(hidden)"'
    assert toml_value("api_token", "") == '""'
    assert toml_value("queue_tokens", 5) == "5"
    assert toml_value("endpoint", "https://me:word@host:1/x") == '"https://(hidden)@host:1/x"'
    [text] = mistakes_of(FERRYMAN_PORT="tcps://me:word@host")
    assert "word" not in text
    [text] = mistakes_of(FERRYMAN_TRACE_ENDPOINT="grpc://me:word@host")
    assert "word" not in text
