"""The connections between the processes of a run, which stay open until its end.

A process that dies closes its connection, and process 0, which has one to each, tells the others: all have ended
within a second, whatever they were doing. What the processes publish of themselves (`train/watchdog`) takes the
same way.

So does what JAX's clients and its coordination service say to each other. A client that loses its service aborts
the process in C++, with a stack and no name of who ended; here it never loses it, since each end is a relay in its
own process.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from cait_jax.rendezvous import Meeting

_GRACE_S = 0.5  # in which a process may end by a sentence or traceback of its own
_EXIT_S = 5.0  # to end after an error of its own
_FLUSH_S = 1.0
_SPEAKS_WITHIN_S = 5.0
_LONGEST_LINE = 2**24
_PIECE = 2**16
_GO_ON = "the same command, in all processes, goes on from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class Published:
    """What a process publishes: where in the run it is, in words, and a report that others read."""

    place: str
    report: dict[str, Any]


class Peers:
    """All processes of a run, as one of them sees them. A thread holds the connections.

    Attributes:
      address: where this process's JAX finds the coordination service, and where that listens in process 0.
    """

    def __init__(
        self,
        meeting: Meeting,
        *,
        index: int,
        coordinator: tuple[str, int],
        end: Callable[[str], None],
    ) -> None:
        """Takes the connections over.

        Args:
          coordinator: host and port at which process 0 listens.
          end: ends this process with a sentence; called in a thread of its own.
        """
        self._index, self._coordinator, self._end = index, coordinator, end
        self._hosts = {**meeting.hosts, index: socket.gethostname()}
        self._published: dict[int, Published] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._left: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio keeps weak references
        self._sentence = ""
        self._decided, self._sent = threading.Event(), threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as free:
            relay = free.dup() if index else None
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._service = ("127.0.0.1", port)
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(
            target=self._run, args=(meeting, relay, started), name="peers", daemon=True
        ).start()
        started.wait()

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

    def _run(self, meeting: Meeting, relay: socket.socket | None, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            for number, connection in meeting.connections.items():
                connection.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=connection, limit=_LONGEST_LINE)
                self._writers[number] = writer
                self._spawn(self._listen(number, reader))
            server = relay or meeting.server
            if server is not None:
                server.setblocking(False)
                accept = self._from_jax if relay else self._from_process
                self._server = await asyncio.start_server(accept, sock=server)
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

    async def _from_jax(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relays a connection of this process's JAX to process 0."""
        with contextlib.suppress(OSError):
            distant, to_distant = await asyncio.open_connection(*self._coordinator)
            to_distant.write(json.dumps({"relay": self._index}).encode() + b"\n")
            self._spawn(_pump(reader, to_distant))
            await _pump(distant, writer, close=False)
        # JAX would abort if its connection closed before this process knows who has ended.
        if 0 in self._left:
            writer.close()

    async def _from_process(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Relays a connection that another process's JAX has opened to the service in this one."""
        try:
            said = json.loads(await asyncio.wait_for(reader.readline(), _SPEAKS_WITHIN_S))
            if not isinstance(said, dict) or "relay" not in said:
                raise ValueError
            service, to_service = await self._open_service()
        except (OSError, ValueError, RecursionError):  # whoever it is; also that nothing came
            writer.close()
            return
        self._spawn(_pump(service, writer))
        await _pump(reader, to_service)

    async def _open_service(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            try:
                return await asyncio.open_connection(*self._service)
            except ConnectionRefusedError:  # JAX has not started it yet
                await asyncio.sleep(0.05)


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, close: bool = True
) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
    if close:
        writer.close()
