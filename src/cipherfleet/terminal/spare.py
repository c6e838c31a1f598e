"""A spare Ukey: keys of its own, the same share of the CMK, and the first Ukey's word that it counts. And the end of one."""

import os
from contextlib import suppress
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from cipherfleet.channel.certificates import check_chain, fingerprint, identity_of, make_request, new_key, public_key_der
from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import CertificateInvalid, CipherfleetError, StateConflict, StatementReplayed, UkeyUnknown
from cipherfleet.contract.escrow import statement_digest, ukey_subject
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.contract.kmc_api import UkeyList, UkeyReply, UkeyRequest
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.statements import UkeyStatement
from cipherfleet.terminal.callers import kmc_caller
from cipherfleet.terminal.catch_up import catch_up
from cipherfleet.terminal.checkpoint import advance, check_recorded
from cipherfleet.terminal.memory import Remembered
from cipherfleet.terminal.pin import pin_bytes, wipe
from cipherfleet.terminal.ukey import DirectoryUkey, PublicRecord, Ukey, UkeySecrets, check_vacant
from cipherfleet.terminal.ukeys import all_known

ATTEMPTS = 3


class NewUkey:
    """A Ukey that counts and is written nowhere yet. ``with`` it: its secrets are wiped at the end."""

    def __init__(self, record: PublicRecord, secrets: UkeySecrets, ciphertext_cmk: bytes, remembered: Remembered) -> None:
        self.record, self.secrets, self.ciphertext_cmk, self.remembered = record, secrets, ciphertext_cmk, remembered

    def __repr__(self) -> str:
        return f"NewUkey({self.record.serial} of {self.record.consumer})"

    def write(self, folder: Path, pin: str | bytearray) -> None:
        """Raises ``PinWrong``, ``Exists``, ``DiskFull`` or ``FileProblem``; nothing is left then."""
        buffer = pin_bytes(pin)
        try:
            hashed = msgspec.structs.replace(self.record.pin, salt=os.urandom(16))
            record = msgspec.structs.replace(self.record, pin=hashed)
            DirectoryUkey.create(folder, record, self.secrets, self.ciphertext_cmk, self.remembered, buffer)
        finally:
            wipe(buffer)

    def __enter__(self) -> "NewUkey":
        return self

    def __exit__(self, *exc: object) -> None:
        self.secrets.wipe()


async def make_spare(ukey: DirectoryUkey, *, label: str) -> NewUkey:
    """A second Ukey of the same consumer, signed by this one, certified and in the escrow's log. Nothing of it is on disk.

    Raises ``UkeyAbsent``, ``EscrowRolledBack``, ``CheckpointForged``, ``CertificateInvalid``, or what the KMC answered.
    """
    identity, channel = new_key(), new_key()
    secrets = UkeySecrets.new(identity, channel)
    try:
        secrets.take_share(ukey.secrets)
        public_key = public_key_der(identity.public_key())
        serial = UkeyId(f"ukey-{fingerprint(public_key)[:8]}")
        named = UkeyStatement(ukey.record.consumer, serial, public_key, 0, label)
        requests = (
            make_request(identity, Identity(Role.UKEY, serial, ukey.record.consumer)),
            make_request(channel, Identity(Role.TERMINAL, serial, ukey.record.consumer)),
        )
        reply = await _submit(ukey, named, *requests)
        try:
            _check(reply, ukey.record, serial, identity, channel)
            record = msgspec.structs.replace(
                ukey.record, serial=serial, identity=reply.identity.chain.decode(), channel=reply.channel.chain.decode()
            )
            cmk = await ukey.ciphertext_cmk()
            return NewUkey(record, secrets, cmk, ukey.memory.known)
        except BaseException:
            with suppress(CipherfleetError):
                await revoke(ukey, serial)
            raise
    except BaseException:
        secrets.wipe()
        raise


async def write_spare(ukey: DirectoryUkey, folder: Path, pin: str | bytearray, *, label: str = "spare") -> UkeyId:
    """A spare Ukey in ``folder``; its serial. What fails takes the spare back. Raises as ``make_spare`` and ``NewUkey.write``."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link that must not be there
    check_vacant(folder)
    wipe(pin_bytes(pin))  # a PIN that is none is refused before anything is signed
    with await make_spare(ukey, label=label) as spare:
        serial = UkeyId(spare.record.serial)
        try:
            spare.write(folder, pin)
        except BaseException:
            with suppress(CipherfleetError):
                await revoke(ukey, serial)
            raise
    return serial


async def revoke(ukey: DirectoryUkey, serial: UkeyId) -> None:
    """Another Ukey of the consumer counts no more. What it signed before stays good, as far as it is numbered.

    Raises ``UkeyUnknown``, ``StateConflict`` for this very Ukey or one that was revoked before, or what the KMC answered.
    """
    if serial == ukey.record.serial:
        raise StateConflict(f"{serial} cannot revoke itself", "use another Ukey of the consumer")
    async with kmc_caller(ukey) as kmc:
        await catch_up(ukey, kmc)
    found = [known for known in all_known(ukey) if known.ukey == serial]
    if not found:
        raise UkeyUnknown(f"{ukey.record.consumer} has no Ukey {serial}")
    if found[0].until:
        raise StateConflict(f"{serial} was revoked before")
    await _submit(ukey, UkeyStatement(ukey.record.consumer, serial, found[0].public_key, 0, revoked=True))


async def list_ukeys(ukey: Ukey) -> UkeyList:
    """The consumer's Ukeys, as the KMC tells."""
    async with kmc_caller(ukey) as kmc:
        return await kmc.call("GET", "/v1/ukeys", reply=UkeyList)


async def _submit(ukey: DirectoryUkey, statement: UkeyStatement, identity_csr: bytes = b"", channel_csr: bytes = b"") -> UkeyReply:
    """Number, sign and send a statement; the answer, once the escrow has shown that it wrote the statement down.

    The Ukey knows it then.
    """
    memory, record = ukey.memory, ukey.record
    async with kmc_caller(ukey) as kmc:
        for attempt in range(1, ATTEMPTS + 1):
            seen = await catch_up(ukey, kmc)
            numbered = msgspec.structs.replace(statement, sequence=await memory.next_sequence())
            signed = await sign(numbered, ukey.signer)
            request = UkeyRequest(signed, identity_csr, channel_csr, seen.sequence)
            try:
                reply = await kmc.call("POST", "/v1/ukeys", request, reply=UkeyReply)
            except StatementReplayed:  # another Ukey took the number
                if attempt == ATTEMPTS:
                    raise
                continue
            point = advance(record.consumer, seen, reply.checkpoint, reply.log, record.kmc_signing_key)
            check_recorded(reply.log, seen, point, ukey_subject(numbered.ukey, numbered.sequence), statement_digest(signed))
            await catch_up(ukey, kmc)
            return reply
    raise RuntimeError("the last attempt returns or raises")


def _check(
    reply: UkeyReply, record: PublicRecord, serial: UkeyId, identity: ec.EllipticCurvePrivateKey, channel: ec.EllipticCurvePrivateKey
) -> None:
    """That the two keys were certified, for this consumer, under the CA on the Ukey. Raises ``CertificateInvalid``."""
    for role, chain, key in ((Role.UKEY, reply.identity, identity), (Role.TERMINAL, reply.channel, channel)):
        _check_one(chain, record, Identity(role, serial, ConsumerId(record.consumer)), key)


def _check_one(chain: Chain, record: PublicRecord, identity: Identity, key: ec.EllipticCurvePrivateKey) -> None:
    check_chain(chain.chain, record.root.encode())
    leaf = check_chain(chain.chain, record.domain.encode())
    if identity_of(leaf) != identity or public_key_der(leaf.public_key()) != public_key_der(key.public_key()):
        raise CertificateInvalid(f"the KMC certified something else than {identity.uri}")
