"""The Ukey: the port, and the directory that stands for the USB key.

**A directory can be copied, and with it the Ukey: whoever has the copy and the PIN is the consumer. It is for trying out and
for tests.** A smart card behind the same port keeps its keys to itself.

The folder holds ``ukey.json`` (public: whose it is, where the platform is, whom to trust), ``secrets.sealed`` (the identity
key, the Ukey share and the channel key under the PIN), ``cmk.bin`` (the ciphertext CMK, which only the HSM opens) and
``checkpoint.json`` (what the Ukey saw of the escrow, and the sequence of its statements), all of mode 0600. It is plugged in
while the folder is there and holds a ``ukey.json`` with its serial; removing or renaming the folder unplugs it.

The PIN has 4 to 64 characters. A file that holds it (first line) should be readable by its owner alone; nobody checks that.
"""

import asyncio
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import Credentials, key_to_pem
from cipherfleet.channel.sealing import TrustedCard
from cipherfleet.channel.signing import LocalSigner, Signer
from cipherfleet.contract.audit import AuditPoint
from cipherfleet.contract.errors import CipherfleetError, Exists, Malformed, StateNewer, UkeyAbsent, UkeyInvalid
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.policy import Policy
from cipherfleet.contract.statements import RevokedUkey
from cipherfleet.state.files import flush_folder, write_private
from cipherfleet.terminal import sealing
from cipherfleet.terminal.files import fault, read_file
from cipherfleet.terminal.memory import DirectoryMemory, KnownUkey, NewPolicy, Remembered
from cipherfleet.terminal.pin import SECRET_BYTES, PinHash, open_secrets, pin_bytes, seal_secrets, wipe

VERSION = 1
WATCH_S = 0.1
RECORD, SECRETS, CMK = "ukey.json", "secrets.sealed", "cmk.bin"
_SCALAR_BYTES = 32
_NO_UKEY_HINT = "an operator writes one with: cipherfleet consumer enroll NAME --ukey DIR"


class PublicRecord(msgspec.Struct, frozen=True):
    """What a Ukey shows without its PIN. ``root``, ``domain``, ``identity``, ``channel``: PEM, chains leaf first."""

    serial: str
    consumer: ConsumerId
    kmc_url: str
    management_url: str
    root: str
    domain: str
    kmc_signing_key: bytes  # SubjectPublicKeyInfo, DER
    identity: str
    channel: str
    cmk_sha256: bytes
    pin: PinHash
    version: int = VERSION


class UkeyShare(Protocol):
    """The Ukey's share of the CMK: it can be sealed to a card, and a card's knowledge of it be checked. No more."""

    async def seal(self, card: TrustedCard, vcm: VcmId) -> bytes: ...

    async def check_confirmation(self, card: CardId, vcm: VcmId, nonce: bytes, answer: bytes) -> None:
        """Raises ``CardUnconfirmed``."""
        ...


class UkeyMemory(Protocol):
    """What the Ukey remembers from one insertion to the next."""

    @property
    def seen(self) -> Seen:
        """The newest checkpoint of the escrow that was verified."""
        ...

    @property
    def policy(self) -> Policy:
        """What the consumer permits itself, as of the last ``look``."""
        ...

    async def set_policy(self, policy: NewPolicy) -> None:
        """Durable when it returns; in force with the next heartbeat. Never goes back: an older one changes nothing."""
        ...

    async def look(self) -> Seen:
        """``seen``, with what other programs have made this Ukey remember meanwhile."""
        ...

    async def remember(self, seen: Seen) -> None:
        """Durable when it returns. Never goes back: raises ``EscrowRolledBack``."""
        ...

    @property
    def audit(self) -> AuditPoint | None:
        """The newest seal on the audit log that was verified."""
        ...

    async def remember_audit(self, point: AuditPoint) -> None:
        """Durable when it returns. Never goes back: an older point changes nothing."""
        ...

    async def next_sequence(self) -> int:
        """A number for a statement, larger than all before; stored durably before it is returned."""
        ...

    async def begin_epoch(self, point: Seen) -> None:
        """A restored escrow was accepted, which goes on at ``point`` in a later epoch. Raises ``EscrowRolledBack``."""
        ...

    @property
    def known(self) -> Remembered:
        """All that is remembered, as of the last look."""
        ...

    async def learn(
        self,
        point: Seen,
        ukeys: tuple[KnownUkey, ...],
        ukey_sequence: int,
        statement_sequence: int,
        policy: NewPolicy | None = None,
    ) -> None:
        """What the escrow showed, verified; never goes back. Raises ``EscrowRolledBack``."""
        ...


class Ukey(Protocol):
    """What the terminal needs of a Ukey; no more than a smart card can do. Raises ``UkeyAbsent`` once it is gone."""

    @property
    def record(self) -> PublicRecord: ...

    @property
    def signer(self) -> Signer:
        """The identity key: signs only while the Ukey is plugged in."""
        ...

    @property
    def share(self) -> UkeyShare: ...

    @property
    def memory(self) -> UkeyMemory: ...

    def channel(self, trust: str) -> Credentials:
        """The terminal's own TLS credentials, trusting ``trust`` (PEM)."""
        ...

    async def ciphertext_cmk(self) -> bytes: ...

    @property
    def present(self) -> bool: ...

    async def removed(self) -> None:
        """Returns as soon as the Ukey is gone."""
        ...

    async def returned(self) -> None:
        """Returns as soon as the Ukey is back; it must then be opened anew."""
        ...

    def close(self) -> None:
        """Forget the secrets."""
        ...


class UkeySecrets:
    """The secrets of a directory Ukey in one buffer that can be wiped: three keys and the seal of its memory."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer

    @classmethod
    def new(cls, identity: ec.EllipticCurvePrivateKey, channel: ec.EllipticCurvePrivateKey) -> "UkeySecrets":
        buffer = bytearray(os.urandom(SECRET_BYTES))
        for start, key in ((0, identity), (2 * _SCALAR_BYTES, channel)):
            buffer[start : start + _SCALAR_BYTES] = key.private_numbers().private_value.to_bytes(_SCALAR_BYTES, "big")
        return cls(buffer)

    def _key(self, index: int) -> ec.EllipticCurvePrivateKey:
        return ec.derive_private_key(int.from_bytes(self._part(index), "big"), ec.SECP256R1())

    def _part(self, index: int) -> bytearray:
        return self.buffer[index * _SCALAR_BYTES : (index + 1) * _SCALAR_BYTES]

    @property
    def identity(self) -> ec.EllipticCurvePrivateKey:
        return self._key(0)

    @property
    def share(self) -> bytearray:
        """32 bytes, a copy for the caller to wipe."""
        return self._part(1)

    @property
    def channel(self) -> ec.EllipticCurvePrivateKey:
        return self._key(2)

    def take_share(self, other: "UkeySecrets") -> None:
        """The other's share instead of one's own: a spare of it."""
        share = other.share
        self.buffer[_SCALAR_BYTES : 2 * _SCALAR_BYTES] = share
        wipe(share)

    @property
    def memory_key(self) -> bytearray:
        return self._part(3)

    def wipe(self) -> None:
        wipe(self.buffer)


class DirectoryUkey:
    """A Ukey that is a folder. ``with DirectoryUkey.open(folder, pin) as ukey: ...``"""

    _last_looked: tuple[int, int, int, int] | None = None

    def __init__(self, folder: Path, record: PublicRecord, secrets: UkeySecrets) -> None:
        self.folder = folder
        self.record = record
        self._secrets: UkeySecrets | None = secrets
        self.memory = DirectoryMemory(folder, record.consumer, secrets.memory_key, lambda: self.present)
        self._signer = LocalSigner(secrets.identity)

    def __repr__(self) -> str:
        return f"DirectoryUkey({self.record.serial} of {self.record.consumer})"

    # -- open, create, close -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: Path | str, pin: str | bytes | bytearray) -> Self:
        """Open the Ukey in ``folder``. Takes a while on purpose (Argon2id).

        Raises ``UkeyAbsent``, ``UkeyInvalid``, ``StateNewer``, ``PinWrong`` or ``FileProblem``.
        """
        folder = Path(folder).absolute()
        raw, record = _read_record(folder)
        sealed, cmk = (read_file(folder / name) for name in (SECRETS, CMK))
        if hashlib.sha256(cmk).digest() != record.cmk_sha256:
            raise UkeyInvalid(f"the ciphertext CMK on {folder} is damaged")
        buffer = pin_bytes(pin)
        try:
            secrets = UkeySecrets(open_secrets(sealed, buffer, record.pin, raw))
        finally:
            wipe(buffer)
        try:
            return cls(folder, record, secrets)
        except BaseException:
            secrets.wipe()
            raise

    @classmethod
    def create(
        cls, folder: Path, record: PublicRecord, secrets: UkeySecrets, ciphertext_cmk: bytes, remembered: Remembered, pin: bytearray
    ) -> None:
        """Write a new Ukey: whole, or not at all. ``folder`` must not exist yet, or be empty.

        Raises ``Exists``, ``DiskFull`` or ``FileProblem``; nothing is left then.
        """
        check_vacant(folder)
        staging: Path | None = None
        try:
            staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            raw = codec.encode(record)
            write_private(staging / SECRETS, seal_secrets(secrets.buffer, pin, record.pin, raw))
            write_private(staging / CMK, ciphertext_cmk)
            DirectoryMemory.write_first(staging, secrets.memory_key, remembered)
            write_private(staging / RECORD, raw)
            flush_folder(staging)
            staging.rename(folder)
            flush_folder(folder.parent)
        except BaseException as exc:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            erase(folder, record.serial)
            if isinstance(exc, OSError):
                raise fault(exc, folder) from exc
            raise

    def close(self) -> None:
        """Wipe what can be wiped; what the TLS and signature libraries copied goes with their objects."""
        if self._secrets is not None:
            self._secrets.wipe()
            self._secrets = None
            self.memory.close()
            del self._signer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- keys ----------------------------------------------------------------------------------------------------------

    @property
    def signer(self) -> Signer:
        return self

    @property
    def share(self) -> UkeyShare:
        return self

    @property
    def secrets(self) -> UkeySecrets:
        """For whoever makes a spare of it. Raises ``UkeyAbsent``."""
        return self._plugged_in()

    @property
    def public_key(self) -> bytes:
        self._unlocked()
        return self._signer.public_key

    async def sign(self, data: bytes) -> bytes:
        """The identity key's signature. Looks for the Ukey right before. Raises ``UkeyAbsent``."""
        self._plugged_in()
        return await self._signer.sign(data)

    async def seal(self, card: TrustedCard, vcm: VcmId) -> bytes:
        """The share for one card, with what the Ukey has seen. Raises ``UkeyAbsent`` or ``CardUntrusted``."""
        secrets = self._plugged_in()
        known = self.memory.known
        others = tuple(ukey.public_key for ukey in known.ukeys if not ukey.until and ukey.public_key != self._signer.public_key)
        share = secrets.share
        try:
            return sealing.seal_share(
                share,
                card,
                vcm,
                consumer=self.record.consumer,
                public_keys=(self._signer.public_key, *others),
                kmc_signing_key=self.record.kmc_signing_key,
                seen=known.seen,
                revoked=tuple(RevokedUkey(ukey.public_key, ukey.until) for ukey in known.ukeys if ukey.until),
            )
        finally:
            wipe(share)

    async def check_confirmation(self, card: CardId, vcm: VcmId, nonce: bytes, answer: bytes) -> None:
        share = self._plugged_in().share
        try:
            sealing.check_confirmation(share, card, vcm, nonce, answer)
        finally:
            wipe(share)

    def channel(self, trust: str) -> Credentials:
        return Credentials(key_to_pem(self._unlocked().channel), self.record.channel.encode(), trust.encode())

    async def ciphertext_cmk(self) -> bytes:
        self._plugged_in()
        return read_file(self.folder / CMK)

    def _unlocked(self) -> UkeySecrets:
        if self._secrets is None:
            raise UkeyAbsent("the Ukey was closed")
        return self._secrets

    def _plugged_in(self) -> UkeySecrets:
        if not self.present:
            raise UkeyAbsent(f"the Ukey {self.record.serial} is not plugged in")
        return self._unlocked()

    # -- presence ------------------------------------------------------------------------------------------------------

    @property
    def present(self) -> bool:
        """Whether the folder is there and is this Ukey. One ``stat``; the file is read only when it is another than before."""
        try:
            status = (self.folder / RECORD).stat()
            looked = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            if looked != self._last_looked:
                self._last_looked = looked if self._same_serial() else None
        except OSError:
            self._last_looked = None
        return self._last_looked is not None

    def _same_serial(self) -> bool:
        with suppress(Malformed, UkeyInvalid):
            record = codec.decode(read_file(self.folder / RECORD), dict[str, object], what=RECORD)
            return record.get("serial") == self.record.serial
        return False

    async def removed(self) -> None:
        while self.present:
            await asyncio.sleep(WATCH_S)

    async def returned(self) -> None:
        while not self.present:
            await asyncio.sleep(WATCH_S)


def read_record(folder: Path | str) -> PublicRecord:
    """What the Ukey in ``folder`` shows without its PIN. Raises ``UkeyAbsent``, ``UkeyInvalid`` or ``StateNewer``."""
    return _read_record(Path(folder).absolute())[1]


def _read_record(folder: Path) -> tuple[bytes, PublicRecord]:
    try:
        (folder / RECORD).stat()
    except OSError as exc:
        raise UkeyAbsent(f"there is no Ukey at {folder}", _NO_UKEY_HINT if folder.is_dir() else "") from exc
    raw = read_file(folder / RECORD)
    try:
        version = codec.decode(raw, dict[str, object]).get("version")
        if isinstance(version, int) and version > VERSION:
            raise StateNewer(f"the Ukey at {folder} has format {version}, this program knows {VERSION}", "upgrade cipherfleet")
        return raw, codec.decode(raw, PublicRecord)
    except Malformed as exc:
        raise UkeyInvalid(f"{folder / RECORD} is damaged") from exc


def check_vacant(folder: Path) -> None:
    """That a Ukey may be written to ``folder``. Raises ``Exists`` or ``FileProblem``."""
    try:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise Exists(f"{folder} exists and is not empty", "choose another folder for the Ukey")
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise fault(None, folder.parent)
    except OSError as exc:
        raise fault(exc, folder) from exc


def erase(folder: Path, serial: str) -> None:
    """Remove the Ukey ``serial``; whatever else stands in its place stays. Erasing what is gone succeeds."""
    with suppress(OSError, CipherfleetError):
        if read_record(folder).serial == serial:
            shutil.rmtree(folder)
