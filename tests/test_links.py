"""Processes of a run find each other, and nobody else gets in between."""

import queue
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial

import pytest

from mlm_jax import links
from mlm_jax.errors import MlmJaxError
from mlm_jax.links import Link, connect, is_loopback, listener

LEAD = "127.0.0.1"


class Board:
    """What process 0 tells, once it has."""

    def __init__(self):
        self.told: queue.Queue[str] = queue.Queue()

    def tell(self, _: str, text: str) -> None:
        self.told.put(text)

    def ask(self, _: str) -> str:
        text = self.told.get(timeout=10)
        self.told.put(text)
        return text


def lead(board: Board, count: int) -> Callable[[], list[Link]]:
    """Process 0 in a thread; what it returns in the end, or raises."""
    found: list = []

    def run() -> None:
        try:
            found.append(connect(0, count, LEAD, board.tell, board.ask))
        except MlmJaxError as why:
            found.append(why)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> list[Link]:
        thread.join(20)
        if isinstance(found[0], MlmJaxError):
            raise found[0]
        return found[0]

    return end


def test_strangers_are_sent_away_and_the_processes_meet_all_the_same(monkeypatch):
    monkeypatch.setattr(links, "HELLO", 0.5)
    board = Board()
    links_of_lead = lead(board, 3)
    port, key = board.ask("").split()
    come = partial(socket.create_connection, (LEAD, int(port)), 10)
    other = "0" * len(key)
    strangers = [come() for _ in range(6)]
    hellos = [b"", b"GET / HTTP/1.1\r\n\r\n", f"{other} 00000001".encode()]
    hellos += [f"{key} 00000003".encode(), f"{key} 0000000x".encode()]  # none of three; no number
    for stranger, hello in zip(strangers, hellos, strict=False):
        stranger.sendall(hello)
    linger = struct.pack("ii", 1, 0)  # the sixth resets its connection
    strangers[5].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    strangers[5].close()
    (second,), (first,) = (connect(i, 3, LEAD, board.tell, board.ask) for i in (2, 1))
    first.send(progress=1)
    second.send(progress=2)
    found = links_of_lead()
    assert [link.index for link in found] == [1, 2]
    assert [link.receive() for link in found] == [[{"progress": 1}], [{"progress": 2}]]
    for stranger in strangers[:5]:
        assert gone(stranger)


def gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # closed before all was read that it had sent
        return True


def test_processes_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(links, "CONNECT", 0.5)
    board = Board()
    links_of_lead = lead(board, 4)
    connect(2, 4, LEAD, board.tell, board.ask)
    with pytest.raises(MlmJaxError, match="2 of 4 processes have come in 0 s; missing: 1, 3"):
        links_of_lead()


def test_a_process_that_cannot_reach_process_0_says_where_it_is():
    with socket.create_server((LEAD, 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        MlmJaxError, match=f"process 1 of 2 cannot reach process 0 at {LEAD}:{port}"
    ):
        connect(1, 2, LEAD, lambda *_: None, lambda _: f"{port} key")


def test_a_run_on_one_host_listens_to_that_host_only():
    with listener(LEAD, 2) as door:
        assert door.getsockname()[0] == LEAD
    with listener("node1", 2) as door:
        assert door.getsockname()[0] in ("::", "0.0.0.0")
    hosts = (LEAD, "::1", "localhost", "node1", "10.0.0.1")
    assert [is_loopback(host) for host in hosts] == [True, True, True, False, False]
