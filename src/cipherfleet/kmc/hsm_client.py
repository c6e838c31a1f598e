"""The HSM over its unix socket: the port's client. A restarted HSM is found again, a missing one is ``hsm-unavailable``."""

import asyncio
import contextlib
from pathlib import Path

from cipherfleet.channel import codec
from cipherfleet.contract.errors import CipherfleetError, ErrorBody, HsmUnavailable, PinWrong
from cipherfleet.kmc import hsm_wire as wire
from cipherfleet.kmc.hsm import KeyHandle, Label, Mechanism

CALL_TIMEOUT_S = 10.0


class HsmClient:
    """An ``Hsm`` in another process. One connection, logged in with ``pin``, one request at a time (a token's one session)."""

    def __init__(self, path: Path, pin: str, *, timeout: float = CALL_TIMEOUT_S) -> None:
        self._path, self._timeout = path, timeout
        self._login = wire.frame(wire.Login(pin))
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            with contextlib.suppress(OSError):
                await streams[1].wait_closed()

    # -- the port ------------------------------------------------------------------------------------------------------

    async def mechanisms(self) -> frozenset[Mechanism]:
        known = set(Mechanism)
        return frozenset(Mechanism(name) for name in (await self._call(wire.Mechanisms())).names if name in known)

    async def generate_key_pair(self, label: Label) -> KeyHandle:
        return _handle(await self._call(wire.GenerateKeyPair(label)))

    async def generate_wrap_key(self, label: Label) -> KeyHandle:
        return _handle(await self._call(wire.GenerateWrapKey(label)))

    async def find(self, label: Label) -> KeyHandle | None:
        return (await self._call(wire.Find(label))).handle

    async def public_key(self, handle: KeyHandle) -> bytes:
        return (await self._call(wire.PublicKey(handle))).data

    async def sign(self, handle: KeyHandle, data: bytes) -> bytes:
        return (await self._call(wire.Sign(handle, data))).data

    async def generate_wrapped(self, handle: KeyHandle) -> bytes:
        return (await self._call(wire.GenerateWrapped(handle))).data

    async def rewrap(self, handle: KeyHandle, wrapped: bytes, recipient: bytes) -> bytes:
        return (await self._call(wire.Rewrap(handle, wrapped, recipient))).data

    async def destroy(self, handle: KeyHandle) -> None:
        await self._call(wire.Destroy(handle))

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _call(self, request: wire.AnyRequest) -> wire.Reply:
        message = wire.frame(request)
        async with self._lock:
            kept = self._streams is not None
            try:
                raw = await self._exchange(message)
            except HsmUnavailable:
                # A connection from before the HSM's restart: once more on a new one. A repeated ``generate`` of a label says ``exists``.
                if not kept:
                    raise
                raw = await self._exchange(message)
        return _checked(raw)

    async def _exchange(self, message: bytes) -> bytes:
        """The reply to ``message``, on a connection that is logged in. Raises ``HsmUnavailable`` or ``PinWrong``."""
        if self._streams is None:
            raw = await self._attempt(self._login)
            try:
                _checked(raw)
            except PinWrong as exc:
                await self._drop()
                raise PinWrong(exc.message, "the HSM runs with another PIN: cipherfleet down, then cipherfleet up") from exc
            except CipherfleetError:
                await self._drop()
                raise
        return await self._attempt(message)

    async def _attempt(self, message: bytes) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                if self._streams is None:
                    with wire.reachable(self._path) as address:
                        self._streams = await asyncio.open_unix_connection(address)
                reader, writer = self._streams
                writer.write(message)
                await writer.drain()
                raw = await wire.read_message(reader, body_timeout=self._timeout)
        except (OSError, TimeoutError, CipherfleetError) as exc:
            await self._drop()
            raise HsmUnavailable("the HSM cannot be reached", "start it again with: cipherfleet up") from exc
        except BaseException:
            await self._drop()  # cancelled in the middle: what comes next on this stream would be another call's reply
            raise
        if raw is None:
            await self._drop()
            raise HsmUnavailable("the HSM closed the connection", "start it again with: cipherfleet up")
        return raw

    async def _drop(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()


def _checked(raw: bytes) -> wire.Reply:
    """Raises the error that the HSM replied with."""
    reply = codec.decode(raw, wire.Reply, what="the HSM's reply", limit=wire.MAX_MESSAGE_BYTES)
    if reply.code:
        raise CipherfleetError.from_body(ErrorBody(reply.code, reply.message))
    return reply


def _handle(reply: wire.Reply) -> KeyHandle:
    if reply.handle is None:
        raise HsmUnavailable("the HSM answered without a handle")
    return reply.handle


__all__ = ["HsmClient"]
