"""Whose share a call is counted in."""

import pytest

from ferryman_service.rpc.peers import peer_host


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.7:53412", "ipv4:192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5342", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:5342", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:5342", "ipv4:192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5342", "ipv6:fe80::/64"),
        ("ipv6:nonsense", "ipv6"),
        ("unix:/run/ferryman.sock", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_peers_of_one_host_are_one(peer, host):
    assert peer_host(peer) == host
