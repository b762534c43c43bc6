"""Open files of this process and their limit."""

import os
import resource

import pytest

from ferryman_service.config import open_files
from tests.fakes.open_files import no_file_left


@pytest.fixture
def soft_limit():
    """A function that sets the soft limit for the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_the_hard_one(soft_limit):
    soft_limit(500)
    assert open_files.limit() == 500
    assert open_files.raise_limit() == open_files.limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_half_of_the_files(soft_limit):
    used = open_files.count()
    soft_limit(2 * used + 2)
    assert not open_files.half_used()
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    assert open_files.half_used()
    for descriptor in opened:
        os.close(descriptor)


def test_no_file_is_left():
    assert not open_files.are_exhausted()
    with no_file_left():
        assert open_files.are_exhausted()
        assert open_files.half_used()
