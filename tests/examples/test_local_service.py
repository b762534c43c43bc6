"""A service for the length of a `with` block: the real program."""

import pytest

from examples.local_service import ServiceFailed, local_service
from ferryman import Client
from ferryman.errors import FerrymanError

pytestmark = pytest.mark.system


def test_service_runs_only_inside_block(tmp_path):
    with local_service(tmp_path / "data", tmp_path / "service.log") as address, Client(address) as client:
        assert list(client.list_models()) == []
    with Client(address, timeout_s=2) as client, pytest.raises(FerrymanError):
        client.get_training_run("run_1")
    assert "serving on" in (tmp_path / "service.log").read_text()


def test_failed_start_shows_end_of_log(tmp_path):
    broken = local_service(tmp_path / "data", tmp_path / "service.log", ["--max-sentences", "0"])
    with pytest.raises(ServiceFailed, match=r"(?s)exit status 2.*--max-sentences is 0"), broken:
        pytest.fail("the block must not be entered")


def test_service_stops_if_block_fails(tmp_path):
    addresses = []

    def fail_inside():
        with local_service(tmp_path / "data", tmp_path / "service.log") as address:
            addresses.append(address)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    with Client(addresses[0], timeout_s=2) as client, pytest.raises(FerrymanError):
        client.get_training_run("run_1")
