"""Enrolling a consumer: its keys are made here and go onto a new Ukey; the KMC certifies them and gives the HSM share."""

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from cipherfleet.channel.certificates import check_chain, identity_of, make_request, new_key, public_key_der
from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import CertificateInvalid, CipherfleetError, Exists, Malformed, ServiceUnavailable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, is_slug
from cipherfleet.contract.kmc_api import EnrolConfirmation, EnrolReply, EnrolRequest
from cipherfleet.contract.management_api import DomainInfo
from cipherfleet.contract.settings import Settings
from cipherfleet.terminal.checkpoint import read_checkpoint
from cipherfleet.terminal.memory import Remembered
from cipherfleet.terminal.pin import PinHash, pin_bytes, wipe
from cipherfleet.terminal.ukey import DirectoryUkey, PublicRecord, UkeySecrets, check_vacant, erase

_CONFIRM_ATTEMPTS = 3


class EnrolResult(msgspec.Struct, frozen=True):
    consumer: ConsumerId
    serial: str
    ukey: str
    subnet: str


async def enrol(
    kmc: Caller,
    management: Caller,
    consumer: ConsumerId,
    folder: Path,
    pin: str | bytearray,
    *,
    kmc_url: str,
    management_url: str,
    settings: Settings | None = None,
) -> EnrolResult:
    """Enrol ``consumer`` (the callers are the operator's) and write its Ukey to ``folder``.

    A failure undoes everything: no consumer, no domain, no folder. Where the platform has no room to write that down, the
    consumer stays pending, and the next enrolment of that name replaces it. Raises ``Exists``, ``PinWrong``, ``DiskFull``,
    ``FileProblem``, ``CertificateInvalid``, or what KMC or management answered.
    """
    if not is_slug(consumer):
        raise Malformed("a consumer's name has 1 to 32 of a-z, 0-9 and dash")
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link that must not be there
    check_vacant(folder)
    buffer = pin_bytes(pin)
    identity, channel = new_key(), new_key()
    keys = UkeySecrets.new(identity, channel)
    serial = f"ukey-{secrets.token_hex(4)}"
    undo = _Undo(kmc, management, consumer, folder)
    try:
        undo.enrolled = True  # an answer that got lost may have been a yes
        reply = await kmc.call("POST", "/v1/consumers", _request(consumer, serial, identity, channel), reply=EnrolReply)
        undo.serial = serial = _check(reply, consumer, identity, channel)
        undo.allotted = True
        domain = await management.call("PUT", f"/v1/consumers/{consumer}", reply=DomainInfo)
        record = PublicRecord(
            serial=serial,
            consumer=consumer,
            kmc_url=kmc_url,
            management_url=management_url,
            root=reply.root.decode(),
            domain=reply.domain.decode(),
            kmc_signing_key=reply.kmc_signing_key,
            identity=reply.identity.chain.decode(),
            channel=reply.channel.chain.decode(),
            cmk_sha256=hashlib.sha256(reply.ciphertext_cmk).digest(),
            pin=PinHash.new(settings or Settings()),
        )
        seen = read_checkpoint(consumer, reply.checkpoint, reply.kmc_signing_key)
        DirectoryUkey.create(folder, record, keys, reply.ciphertext_cmk, Remembered(seen), buffer)
        try:
            await _confirm(kmc, consumer, serial)
        except Exists:  # another enrolment has the name by now: it is not ours to take back
            undo.enrolled = undo.allotted = False
            raise
    except BaseException as exc:
        if isinstance(exc, Exists) and not undo.serial:
            undo.enrolled = False  # the name is somebody else's, who keeps it
        await undo.run()
        raise
    finally:
        keys.wipe()
        wipe(buffer)
    return EnrolResult(consumer, serial, str(folder), domain.subnet)


class _Undo:
    """What a failed enrolment takes back, newest first."""

    def __init__(self, kmc: Caller, management: Caller, consumer: ConsumerId, folder: Path) -> None:
        self.enrolled = self.allotted = False
        self.serial = ""
        self._kmc, self._management, self._consumer, self._folder = kmc, management, consumer, folder

    async def run(self) -> None:
        if self.serial:
            erase(self._folder, self.serial)
        if self.allotted:
            with suppress(CipherfleetError):
                await self._management.call("DELETE", f"/v1/consumers/{self._consumer}")
        if self.enrolled:
            with suppress(CipherfleetError):
                await self._kmc.call("DELETE", f"/v1/consumers/{self._consumer}")


def _request(consumer: ConsumerId, serial: str, identity: ec.EllipticCurvePrivateKey, channel: ec.EllipticCurvePrivateKey) -> EnrolRequest:
    return EnrolRequest(
        consumer,
        make_request(identity, Identity(Role.UKEY, serial, consumer)),
        make_request(channel, Identity(Role.TERMINAL, serial, consumer)),
    )


def _check(reply: EnrolReply, consumer: ConsumerId, identity: ec.EllipticCurvePrivateKey, channel: ec.EllipticCurvePrivateKey) -> str:
    """That the reply certifies our two keys for this consumer, all under one root; the Ukey's serial, which the CA decides.

    Raises ``CertificateInvalid``.
    """
    check_chain(reply.domain, reply.root)
    serials = set()
    for role, chain, key in ((Role.UKEY, reply.identity.chain, identity), (Role.TERMINAL, reply.channel.chain, channel)):
        check_chain(chain, reply.root)
        leaf = check_chain(chain, reply.domain)
        named = identity_of(leaf)
        if named.role is not role or named.consumer != consumer or public_key_der(leaf.public_key()) != public_key_der(key.public_key()):
            raise CertificateInvalid(f"the KMC certified {named.uri} instead of this Ukey's {role} key")
        serials.add(named.id)
    if len(serials) != 1:
        raise CertificateInvalid("the KMC gave the Ukey two names")
    return serials.pop()


async def _confirm(kmc: Caller, consumer: ConsumerId, serial: str) -> None:
    """The Ukey is written: the consumer is no longer pending. A lost answer is asked for again.

    Raises ``Exists`` when the name is another Ukey's by now.
    """
    for attempt in range(_CONFIRM_ATTEMPTS):
        try:
            await kmc.call("POST", f"/v1/consumers/{consumer}/confirm", EnrolConfirmation(serial))
            return
        except ServiceUnavailable:
            if attempt == _CONFIRM_ATTEMPTS - 1:
                raise
