"""Connections between process 0 of a run and each other one, over which they watch each other."""

import contextlib
import ipaddress
import json
import resource
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from mlm_jax.errors import MlmJaxError

CONNECT = 300.0  # seconds for all processes to come
HELLO = 5.0  # seconds for one that has come to say who it is


class Link:
    """A connection to another process: what it sends, and whether it is there."""

    def __init__(self, connection: socket.socket, index: int):
        self.connection, self.index, self.closed = connection, index, False
        self._rest = b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # which reading finds too
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What there is; at the end of the connection, `closed` is set."""
        try:
            got = self.connection.recv(2**16)
        except OSError:
            got = b""
        self.closed = not got
        *lines, self._rest = (self._rest + got).split(b"\n")
        return [json.loads(line) for line in lines]


def connect(
    index: int, count: int, lead_host: str, tell: Callable[[str, str], None],
    ask: Callable[[str], str],
) -> list[Link]:  # fmt: skip
    """Of process 0 links to all others, of those one to it.

    tell, ask: how process 0 says at which port it listens, and the key of this run, which a process
    has to show there: whoever else comes is sent away. Raises MlmJaxError where they do not meet.
    """
    if index:
        port, key = ask("links").split()
        try:
            connection = socket.create_connection((lead_host, int(port)), CONNECT)
            connection.sendall(f"{key} {index:08}".encode())
        except OSError as why:
            raise MlmJaxError(
                f"process {index} of {count} cannot reach process 0 at {lead_host}:{port} ({why});"
                " no firewall may stand between the hosts of a run"
            ) from why
        return [Link(connection, 0)]
    allow_links(count)
    key, links = secrets.token_hex(16), {}
    end = time.monotonic() + CONNECT
    with listener(lead_host, count) as door:
        tell("links", f"{door.getsockname()[1]} {key}")
        while len(links) < count - 1:
            door.settimeout(max(end - time.monotonic(), 1e-3))
            try:
                connection, _ = door.accept()
            except TimeoutError:
                raise MlmJaxError(
                    f"{len(links) + 1} of {count} processes have come in {CONNECT:.0f} s; missing:"
                    f" {', '.join(str(i) for i in range(1, count) if i not in links)}"
                ) from None
            which = who_says(connection, key)
            if which and which < count and which not in links:
                connection.settimeout(CONNECT)
                links[which] = Link(connection, which)
            else:
                connection.close()
    return [links[i] for i in sorted(links)]


def who_says(connection: socket.socket, key: str) -> int | None:
    """The process at the other end, if it shows this key; else it is none of ours."""
    hello, end = b"", time.monotonic() + HELLO
    length = len(key) + 9  # read no further: what follows is for the Link
    with contextlib.suppress(OSError):
        while len(hello) < length and (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (got := connection.recv(length - len(hello))):
                break
            hello += got
    shown, _, index = hello.partition(b" ")
    ours = secrets.compare_digest(shown, key.encode()) and index.isdigit()
    return int(index) if ours else None


def listener(lead_host: str, count: int) -> socket.socket:
    """Where a run is on one host, and says so, nobody else can reach it."""
    if is_loopback(lead_host):
        family = socket.AF_INET6 if ":" in lead_host else socket.AF_INET
        return socket.create_server((lead_host, 0), family=family, backlog=count)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=count)


def is_loopback(host: str) -> bool:
    """By its name only: a host often knows itself under an address that no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allow_links(count: int) -> None:
    """Many systems let a process open 1024 files, unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard and count > soft // 2:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
