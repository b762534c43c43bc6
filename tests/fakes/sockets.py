"""The sockets at which processes listen, read from /proc (proc(5)); no process is asked."""

import contextlib
import ipaddress
import os
from pathlib import Path

_LISTENING = "0A"
_UNCONNECTED = "07"
_ACCEPTS = 1 << 16


def group_of(leader):
    """Return the pids of the processes in the group of `leader`."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(ProcessLookupError):
            if name.isdigit() and os.getpgid(int(name)) == leader:
                found.append(int(name))
    return found


def listening(pid):
    """Return the addresses at which a process waits for others: (kind, address) of TCP, UDP and Unix sockets."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        inodes = {link.removeprefix("socket:[").rstrip("]") for link in held if link.startswith("socket:")}
        return {(kind, address) for inode, kind, address in _waiting(pid) if inode in inodes}
    return set()


def _waiting(pid):
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == (_LISTENING if kind.startswith("tcp") else _UNCONNECTED):
                yield fields[9], kind, _address(fields[1].partition(":")[0])
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _ACCEPTS:
            yield fields[6], "unix", " ".join(fields[7:])


def _address(digits):
    """Return the address of hexadecimal digits, of which each group of eight is in the machine's own byte order."""
    words = (bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8))
    return ipaddress.ip_address(b"".join(words))
