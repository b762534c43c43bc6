"""A process that has no file left to open."""

import contextlib
import os
import resource


@contextlib.contextmanager
def no_file_left():
    """Let every attempt of this process to open a file fail with EMFILE, while the block runs."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
