"""Room that is kept free for the last word of a worker whose disk is full."""

from ferryman_service.stores.reserve import free_reserve, make_reserve


def test_the_reserve_takes_room_and_gives_it_back(folder):
    make_reserve(folder.reserve)
    made = folder.reserve.stat()
    assert made.st_size == 1 << 20
    make_reserve(folder.reserve)
    assert folder.reserve.stat().st_ino == made.st_ino, "it is made once"
    free_reserve(folder.reserve)
    free_reserve(folder.reserve)
    assert not folder.reserve.exists()


def test_a_disk_without_room_has_no_reserve(folder):
    folder.reserve.symlink_to("/dev/full")  # which exists, but takes nothing
    free_reserve(folder.reserve)
    (folder.root / "gone").mkdir()
    (folder.root / "gone").rmdir()
    make_reserve(folder.root / "gone" / "reserve")
