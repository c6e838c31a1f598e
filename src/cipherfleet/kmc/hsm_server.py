"""The embedded HSM's own process: it serves its port on a unix socket to processes of the same user that know its PIN."""

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import struct
from pathlib import Path
from typing import assert_never

import msgspec

from cipherfleet.contract.errors import CipherfleetError, Internal, LoginRefused, Malformed, OutOfOrder, PinWrong, StateNotWritable
from cipherfleet.kmc import hsm_wire as wire
from cipherfleet.kmc.hsm import Hsm

log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 5.0
LOGIN_TIMEOUT_S = 5.0
WRONG_PIN_DELAY_S = 0.5
MAX_CONNECTIONS = 64
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class HsmServer:
    """Serves one ``Hsm``. One request at a time per connection, in order, after a login with ``pin``."""

    def __init__(self, hsm: Hsm, path: Path, pin: str, *, uid: int | None = None) -> None:
        if not pin:
            raise RuntimeError("an HSM without a PIN would be anybody's")
        self._hsm, self._path, self._pin = hsm, path, pin.encode()
        self._uid = os.geteuid() if uid is None else uid
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises ``StateNotWritable``; a socket that a dead process left is replaced."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.parent.chmod(0o700)
            self._path.unlink(missing_ok=True)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with wire.reachable(self._path) as address:
                try:
                    listening.bind(address)
                    Path(address).chmod(0o600)
                except OSError:
                    listening.close()
                    raise
        except OSError as exc:
            raise StateNotWritable(f"cannot listen on {self._path}: {exc.strerror}") from exc
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server = None
            self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._tasks) > MAX_CONNECTIONS or not self._is_ours(writer):
                return
            if not await self._login(reader, writer):
                return
            while (raw := await wire.read_message(reader, body_timeout=BODY_TIMEOUT_S)) is not None:
                writer.write(wire.frame(await self._answer(raw)))
                await writer.drain()
        except CipherfleetError as exc:
            # The stream's boundaries are lost: say why, then hang up.
            with contextlib.suppress(OSError):
                writer.write(wire.frame(wire.Reply(code=exc.code, message=exc.message)))
        except (OSError, TimeoutError):
            log.info("a connection to the HSM broke off")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _login(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """The first message; ``False`` at an end before it. Raises ``LoginRefused``, or ``PinWrong`` after a delay."""
        async with asyncio.timeout(LOGIN_TIMEOUT_S):
            raw = await wire.read_message(reader, body_timeout=BODY_TIMEOUT_S)
        if raw is None:
            return False
        try:
            login = msgspec.json.decode(raw, type=wire.Login)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise LoginRefused("the HSM takes no request before a login") from exc
        if not hmac.compare_digest(login.pin.encode(errors="surrogatepass"), self._pin):
            log.warning("a login to the HSM with a wrong PIN was refused")
            await asyncio.sleep(WRONG_PIN_DELAY_S)
            raise PinWrong("this is not the HSM's PIN")
        writer.write(wire.frame(wire.Reply()))
        await writer.drain()
        return True

    def _is_ours(self, writer: asyncio.StreamWriter) -> bool:
        connection: socket.socket = writer.get_extra_info("socket")
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        uid: int = _CREDENTIALS.unpack(raw)[1]
        if uid != self._uid:
            log.warning("a process of user %d was refused", uid)
        return uid == self._uid

    async def _answer(self, raw: bytes) -> wire.Reply:
        try:
            try:
                request: wire.AnyRequest = msgspec.json.decode(raw, type=wire.AnyRequest)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
                raise Malformed("this is not a request to the HSM") from exc
            return await self._do(request)
        except CipherfleetError as exc:
            return wire.Reply(code=exc.code, message=exc.message)
        except Exception as exc:
            log.error("internal error in the HSM: %s", type(exc).__name__)  # noqa: TRY400 - a message could hold key material
            return wire.Reply(code=Internal.code, message="something went wrong in the HSM")

    async def _do(self, request: wire.AnyRequest) -> wire.Reply:
        hsm = self._hsm
        match request:
            case wire.Login():
                raise OutOfOrder("this connection is logged in already")
            case wire.Mechanisms():
                return wire.Reply(names=tuple(sorted(await hsm.mechanisms())))
            case wire.GenerateKeyPair(label):
                return wire.Reply(handle=await hsm.generate_key_pair(label))
            case wire.GenerateWrapKey(label):
                return wire.Reply(handle=await hsm.generate_wrap_key(label))
            case wire.Find(label):
                return wire.Reply(handle=await hsm.find(label))
            case wire.PublicKey(handle):
                return wire.Reply(await hsm.public_key(handle))
            case wire.Sign(handle, data):
                return wire.Reply(await hsm.sign(handle, data))
            case wire.GenerateWrapped(handle):
                return wire.Reply(await hsm.generate_wrapped(handle))
            case wire.Rewrap(handle, wrapped, recipient):
                return wire.Reply(await hsm.rewrap(handle, wrapped, recipient))
            case wire.Destroy(handle):
                await hsm.destroy(handle)
                return wire.Reply()
            case _:
                assert_never(request)
