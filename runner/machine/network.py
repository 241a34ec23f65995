"""Network addresses of this machine, as other machines see them."""

from __future__ import annotations

import socket
from contextlib import suppress

ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): the way there is the default route."""


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[address]:port`, which the schema has checked."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def is_own(host: str) -> bool:
    """The name or address is this machine's: one that is not cannot be bound to (bind(2), EADDRNOTAVAIL)."""
    for family, kind, protocol, _, address in _resolved(host):
        with suppress(OSError), socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
            return True
    return False


def interface(endpoint: str, address: str | None = None) -> str | None:
    """Name of the network interface on which this machine meets the others, such as `eth0`; None if it cannot be told.

    It is the one that has `address`, else the one on the way to the rendezvous. On the first machine its own name may
    stand for a loopback address (Debian's /etc/hosts: 127.0.1.1), where nobody else finds it: then the default route's.
    """
    import psutil  # comes with training, and this is asked only then

    own = [a[4][0] for a in _resolved(address)] if address else [_towards(split(endpoint)[0]), _towards(ELSEWHERE)]
    names = {a.address.partition("%")[0]: name for name, some in psutil.net_if_addrs().items() for a in some}
    found = (names.get(str(one)) for one in own if one and not str(one).startswith("127.") and one != "::1")
    return next((name for name in found if name), None)


def _towards(host: str) -> str | None:
    """The address that this machine sends from; nothing is sent: a UDP socket only picks its route when connected."""
    for family, _, _, _, address in _resolved(host):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.connect((address[0], 9, *address[2:]))
            return str(trial.getsockname()[0])
    return None


def _resolved(host: str) -> list[tuple[int, int, int, str, tuple[str | int, ...]]]:
    try:
        return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)  # type: ignore[return-value]  # IPv4 or 6
    except OSError:
        return []
