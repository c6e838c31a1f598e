"""What a machine holds of its card: the process, its control socket, and nothing that is secret."""

import asyncio
import socket
import sys
from contextlib import suppress
from pathlib import Path

from cipherfleet.channel import codec
from cipherfleet.channel.process import register, start_child
from cipherfleet.computing.card_control import (
    Attach,
    CardConfig,
    CardReady,
    CardStatus,
    Certify,
    ControlChannel,
    Detach,
    FromCard,
    Limit,
    StatusWanted,
    ToCard,
    VccStatus,
)
from cipherfleet.contract.errors import CardUnavailable, CipherfleetError, TimedOut
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import NO_LIMITS, VccLimits

ANSWER_S = 10.0
GRACE_S = 2.0


class CardHandle:
    """A running card process. Made by ``start``."""

    def __init__(self, process: asyncio.subprocess.Process, info: CardReady, channel: ControlChannel, entry: Path | None) -> None:
        self.id, self.csr, self.hpke_public_key, self.protection = info.id, info.csr, info.hpke_public_key, info.protection
        self.pid = process.pid
        self._process, self._channel, self._entry = process, channel, entry
        self._number = 0
        self._pending: dict[int, asyncio.Future[FromCard]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, machine: MachineId, log_folder: Path, settings: Settings, run_folder: Path | str = "", *, timeout: float = 30.0
    ) -> "CardHandle":
        """A new card in a process of its own; it has a file in ``run_folder`` (if given) while it runs.

        Raises what the card reported, ``TimedOut`` or ``Internal``; no process is left then.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process, raw = await start_child(
                [sys.executable, "-m", "cipherfleet.app.roles", "card"],
                CardConfig(machine, theirs.fileno(), settings),
                log_file=log_folder / "card.log",
                pass_fds=(theirs.fileno(),),
                timeout=timeout,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            info = codec.decode(raw, CardReady, what="the card's report")
            entry = register(Path(run_folder), "card", info.id, process.pid) if str(run_folder) else None
        except BaseException:
            process.kill()
            await process.wait()
            ours.close()
            raise
        return cls(process, info, ControlChannel(ours), entry)

    async def certify(self, reply: CardReply) -> None:
        """Give the card its certificate and the key that countersigns leases. Raises ``CertificateInvalid`` or ``Exists``."""
        await self._ask(Certify(self._next(), reply))

    async def attach(self, vcm: VcmId, consumer: ConsumerId, limits: VccLimits = NO_LIMITS) -> socket.socket:
        """A new vCC; the VCM's end of it, to be inherited by the VCM and closed here. Raises ``Exists``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await self._ask(Attach(self._next(), vcm, consumer, limits), (theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    async def detach(self, vcm: VcmId) -> None:
        """Zeroise a vCC's keys and close it. Detaching what is gone succeeds, also when the whole card is gone."""
        with suppress(CardUnavailable):
            await self._ask(Detach(self._next(), vcm))

    async def limit(self, vcm: VcmId, limits: VccLimits) -> None:
        """Hold a vCC to ``limits`` from now on. Raises ``VcmUnknown``."""
        await self._ask(Limit(self._next(), vcm, limits))

    async def status(self) -> CardStatus:
        """Raises ``CardUnavailable``."""
        answer = await self._ask(StatusWanted(self._next()))
        if answer.status is None:
            raise CardUnavailable("the crypto card did not say how it is")
        return answer.status

    async def wait(self) -> None:
        """Until the card's process is gone."""
        await self._process.wait()
        if self._entry is not None:
            self._entry.unlink(missing_ok=True)

    async def stop(self) -> None:
        """End the card: its keys are zeroised. Stopping twice is well."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), GRACE_S)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.kill()
        await self.wait()
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        self._channel.close()

    # -- the control socket --------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._number += 1
        return self._number

    async def _ask(self, request: ToCard, descriptors: tuple[int, ...] = ()) -> FromCard:
        if self._reader.done():
            raise CardUnavailable("the crypto card's process is gone")
        future: asyncio.Future[FromCard] = asyncio.get_running_loop().create_future()
        self._pending[request.number] = future
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._channel.send(request, descriptors)
                answer = await future
        except TimeoutError as exc:
            raise TimedOut("the crypto card did not answer in time") from exc
        finally:
            self._pending.pop(request.number, None)
        if answer.error is not None:
            raise CipherfleetError.from_body(answer.error)
        return answer

    async def _read(self) -> None:
        try:
            while raw := await self._channel.receive():
                answer = codec.decode(raw, FromCard, what="the card's answer")
                future = self._pending.get(answer.number)
                if future is not None and not future.done():
                    future.set_result(answer)
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(CardUnavailable("the crypto card's process is gone"))


__all__ = ["CardHandle", "CardStatus", "VccStatus"]
