"""A process between a client and a server on TCP, whose connection to the client outlives the server.

Run as a script by `peers`, without the package: python relay.py DESCRIPTOR HOST PORT, where DESCRIPTOR is a
listening socket that it inherits, and HOST and PORT the server. It ends when its standard input closes.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

_PIECE = 2**16
_PAUSE_S = 0.05


def main(descriptor: int, host: str, port: int) -> None:
    """Relays every connection of the listening socket, each by two threads."""
    # Of the process that started it; signals are its affair alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_input, daemon=True).start()
    with socket.socket(fileno=descriptor) as listening:
        while True:
            client, _ = listening.accept()
            threading.Thread(target=_relay, args=(client, host, port), daemon=True).start()


def _relay(client: socket.socket, host: str, port: int) -> None:
    server = _connect(host, port)
    threading.Thread(target=_pump, args=(client, server), daemon=True).start()
    _pump(server, client)


def _connect(host: str, port: int) -> socket.socket:
    while True:  # it may start later than its clients
        try:
            return socket.create_connection((host, port))
        except OSError:
            time.sleep(_PAUSE_S)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
