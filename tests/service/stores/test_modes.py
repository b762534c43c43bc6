"""Who may read and write the data folder."""

import logging
import os
import stat
import tempfile
from pathlib import Path

import pytest

from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.modes import WorldWritable

OURS, OTHER = 54_321, 54_322
GROUP, OTHER_GROUP = 54_331, 54_332


def as_user(action):
    """Return what `action` returns, a number, in a process of the user OURS, whose second group is GROUP."""
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([GROUP])
            os.setgid(OURS)
            os.setuid(OURS)
            os._exit(action())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def root():
    """A folder that its parents hide from nobody; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield Path(parent) / "data"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize(
    ("mode", "owner", "group", "left", "umask", "warns"),
    [
        (0o700, OURS, OURS, 0o700, 0o077, False),
        (0o755, OURS, OURS, 0o700, 0o077, False),
        (0o755, OURS, GROUP, 0o700, 0o077, False),
        (0o775, OURS, OTHER_GROUP, 0o700, 0o077, False),
        (0o775, OURS, OURS, 0o770, 0o007, False),
        (0o1777, OURS, OTHER_GROUP, 0o1700, 0o077, False),
        (0o2775, OURS, GROUP, 0o2770, 0o007, False),
        (0o750, OURS, GROUP, 0o750, 0o027, False),
        (0o2770, OTHER, GROUP, 0o2770, 0o007, False),
        (0o2775, OTHER, GROUP, 0o2775, 0o007, True),
    ],
)
def test_others_get_nothing_and_the_group_what_it_was_given(root, mode, owner, group, left, umask, warns):
    root.mkdir()
    os.chown(root, owner, group)
    root.chmod(mode)

    def create():
        warnings = []
        handler = logging.Handler()
        handler.emit = warnings.append
        logging.getLogger("ferryman_service").addHandler(handler)
        folder = DataFolder(root)
        folder.create()
        os.umask(folder.umask())
        (root / "file").touch()
        return len(warnings)

    assert as_user(create) == warns
    assert stat.S_IMODE(root.stat().st_mode) == left
    assert stat.S_IMODE((root / "file").stat().st_mode) == 0o666 & ~umask


def test_a_new_folder_is_for_this_user_alone(root):
    DataFolder(root).create()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert DataFolder(root).umask() == 0o077


@pytest.mark.parametrize("mode", [0o777, 0o2777, 0o1777, 0o702])
def test_a_folder_that_everybody_can_write_is_refused(root, mode):
    """Unless it is ours and empty: then nobody has put anything into it."""
    root.mkdir()
    root.chmod(mode)
    (root / "models").mkdir()
    with pytest.raises(WorldWritable, match=r"every user .* can write to the data folder .*: chmod o-w "):
        DataFolder(root).create()
    assert list(root.iterdir()) == [root / "models"]


def test_a_mode_that_cannot_be_changed_warns(root, monkeypatch, caplog):
    root.mkdir(0o755)
    monkeypatch.setattr(type(root), "chmod", lambda self, mode: (_ for _ in ()).throw(PermissionError(1, "no")))
    DataFolder(root).create()
    assert "can read" in caplog.text
    assert "cannot be changed" in caplog.text
