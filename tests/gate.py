"""A TCP door in front of a server: closed, nothing answers at its port, and connections break; the server lives on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Forwards `port` of loopback to `target`, while it is open."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.passing: set[socket.socket] = set()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.open()

    def open(self) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen(64)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def close(self) -> None:
        for end in (self.listener, *self.passing):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.passing.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                inside, _ = listener.accept()
                outside = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.passing |= {inside, outside}
            for source, sink in ((inside, outside), (outside, inside)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            self.passing.discard(end)
            end.close()


@contextmanager
def gate(target: int) -> Iterator[Gate]:
    """An open one, closed with the block."""
    door = Gate(target)
    try:
        yield door
    finally:
        door.close()
