"""The connections between the processes of a run, which stay open until its end.

A process that dies closes its connection, and process 0, which has one to each, tells the others: all have ended
within a second, whatever they were doing. What the processes publish of themselves (`train/watchdog`) takes the
same way.

A client of JAX's coordination service that loses it aborts its process in C++, with a stack and no name of who
ended. So it is connected through `relay`, a process of its own, whose connection to it stays open. A thread could
not pass on what JAX waits for while it holds the interpreter's lock.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from cait_jax import relay
from cait_jax.rendezvous import Meeting

_GRACE_S = 0.25  # in which a process may end by a sentence or traceback of its own
_EXIT_S = 5.0  # to end after an error of its own
_FLUSH_S = 1.0
_LONGEST_LINE = 2**24
_GO_ON = "the same command, in all processes, goes on from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class Published:
    """What a process publishes: where in the run it is, in words, and a report that others read."""

    place: str
    report: dict[str, Any]


class Peers:
    """All processes of a run, as one of them sees them. A thread holds the connections.

    Attributes:
      address: where this process's JAX finds the coordination service.
      bind_address: where that listens, in process 0.
    """

    def __init__(self, meeting: Meeting, *, index: int, end: Callable[[str], None]) -> None:
        """Takes the connections over.

        Args:
          end: ends this process with a sentence; called in a thread of its own.
        """
        self._index, self._end = index, end
        self._hosts = {**meeting.hosts, index: socket.gethostname()}
        self._published: dict[int, Published] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._left: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio keeps weak references
        self._sentence = ""
        self._decided, self._sent = threading.Event(), threading.Event()
        host, port = meeting.service
        self.bind_address = _address(meeting.bind or host, port)
        self.address = self._start_relay(host, port) if index else _address(host, port)
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(
            target=self._run, args=(meeting.connections, started), name="peers", daemon=True
        ).start()
        started.wait()

    def _start_relay(self, host: str, port: int) -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            command = [sys.executable, "-I", "-S", relay.__file__]
            # It ends when its standard input closes, with this process.
            self._relay = subprocess.Popen(
                [*command, str(server.fileno()), host, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[server.fileno()],
                start_new_session=True,
            )
            return _address(*server.getsockname())

    def exchange(self, place: str, report: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Publishes a report, and gives the last of each process."""
        self._call(self._publish(Published(place, report)))
        return {index: published.report for index, published in list(self._published.items())}

    def end_all(self, sentence: str) -> None:
        """Ends every process with a sentence, this one included."""
        self._call(self._tell(sentence))

    def end_others(self, sentence: str) -> None:
        """Ends every other process with a sentence; this one is about to end by an error of its own."""
        self._call(self._tell(sentence, others_only=True))
        self._sent.wait(_FLUSH_S)

    def leave(self) -> None:
        """Says that this process has done its part: it is not missed from here on. Waits until it is sent."""
        with contextlib.suppress(Exception):
            self._call(self._say_goodbye()).result(_FLUSH_S)

    def verdict(self, seconds: float) -> str:
        """Why the run ends, if another process has ended or that becomes known within `seconds`; else ""."""
        self._decided.wait(seconds)
        return self._sentence

    def name(self, index: int) -> str:
        """A process with its host."""
        return f"process {index} on {self._hosts[index]}"

    # In the thread.

    def _call(self, work: Coroutine[Any, Any, None]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self, connections: dict[int, socket.socket], started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            for number, connection in connections.items():
                connection.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=connection, limit=_LONGEST_LINE)
                self._writers[number] = writer
                self._spawn(self._listen(number, reader))
            started.set()

        self._spawn(start())
        self._loop.run_forever()

    async def _listen(self, number: int, reader: asyncio.StreamReader) -> None:
        """Hears a process until its connection closes."""
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                if line.endswith(b"\n"):
                    self._hear(number, json.loads(line))
        if number not in self._left and not self._sentence:
            published = self._published.get(number)
            place = published.place if published else "its start"
            await self._tell(
                f"{self.name(number)} has ended, last in {place}: look at its last line for the cause (there is "
                f"none if it was killed or its machine is gone); {_GO_ON}"
            )

    def _hear(self, number: int, said: dict[str, Any]) -> None:
        if "left" in said:
            self._left.add(number)
        if "end" in said:
            self._spawn(self._tell(said["end"]))
        for index, published in said.get("published", {}).items():
            if int(index) != self._index:
                self._published[int(index)] = Published(**published)

    async def _publish(self, published: Published) -> None:
        self._published[self._index] = published
        known = self._published if self._index == 0 else {self._index: published}
        self._send({"published": {i: dataclasses.asdict(p) for i, p in known.items()}})

    async def _say_goodbye(self) -> None:
        self._send({"left": True})
        await self._drain()

    async def _tell(self, sentence: str, *, others_only: bool = False) -> None:
        if self._sentence:
            return
        self._sentence = sentence
        self._decided.set()
        self._send({"end": sentence})
        await self._drain()
        self._sent.set()
        # At its exit JAX would wait for processes that are gone.
        await asyncio.sleep(_EXIT_S if others_only else _GRACE_S)
        threading.Thread(target=self._end, args=(sentence,), daemon=True).start()

    def _send(self, said: dict[str, Any]) -> None:
        line = json.dumps(said).encode() + b"\n"
        for writer in self._writers.values():
            if not writer.is_closing():
                writer.write(line)

    async def _drain(self) -> None:
        for writer in list(self._writers.values()):
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), _FLUSH_S)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
