"""The one way out of a VCM's empty network: a unix socket whose bytes the machine pipes to the KMC's address, and nowhere else.

TLS is end to end, so the machine learns nothing.
"""

import asyncio
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

SOCKET_NAME = "kmc.sock"
MAX_CONNECTIONS = 32
CONNECT_S = 5.0
_PIECE_BYTES = 64 * 1024


class Relay:
    """Listens on ``folder/kmc.sock`` for one VCM and connects to ``target`` (host, port) for each connection."""

    def __init__(self, folder: Path, target: tuple[str, int]) -> None:
        self._folder, self._target = folder, target
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """``folder`` is made for it. Raises ``OSError``."""
        self._folder.mkdir(mode=0o700)
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        descriptor = os.open(self._folder, os.O_PATH | os.O_CLOEXEC)
        try:
            opened.bind(f"/proc/self/fd/{descriptor}/{SOCKET_NAME}")  # the path itself may be longer than a socket's may be
            opened.setblocking(False)
            self._server = await asyncio.start_unix_server(self._accept, sock=opened)
        except BaseException:
            opened.close()
            raise
        finally:
            os.close(descriptor)

    @property
    def connections(self) -> int:
        return len(self._pipes)

    async def close(self) -> None:
        """Stop listening and cut what is open, now."""
        if self._server is not None:
            self._server.close()
        for pipe in list(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        (self._folder / SOCKET_NAME).unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._pipes) >= MAX_CONNECTIONS:
            log.warning("a VCM has %d connections to the KMC, no more", MAX_CONNECTIONS)
            writer.transport.abort()
            return
        task = asyncio.create_task(self._pipe(reader, writer))
        self._pipes.add(task)
        task.add_done_callback(self._pipes.discard)

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        outer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                outer_reader, outer = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, outer))
                group.create_task(_copy(outer_reader, writer))
        except (OSError, TimeoutError, ExceptionGroup):
            pass  # the connection ends: the VCM tries again
        finally:
            for end in (writer, outer):
                if end is not None:
                    end.transport.abort()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while piece := await source.read(_PIECE_BYTES):
        sink.write(piece)
        await sink.drain()
    with suppress(OSError, RuntimeError):
        sink.write_eof()
