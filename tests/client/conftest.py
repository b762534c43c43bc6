"""A fake service and a client of it, for every test of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ferryman import Client, Corpus
from ferryman.testing import FakeFerryman


@pytest.fixture
def fake() -> Iterator[FakeFerryman]:
    with FakeFerryman() as fake:
        yield fake


@pytest.fixture
def client(fake: FakeFerryman) -> Iterator[Client]:
    with Client(fake.target) as client:
        yield client


@pytest.fixture
def corpus(client: Client) -> Corpus:
    return client.upload_corpus("toy", "en", "de", train=[("one", "eins"), ("two", "zwei")], validation=[("a", "b")])
