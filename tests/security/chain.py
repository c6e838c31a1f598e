"""What only a test may do: hold every part of a consumer's key chain at once, to look for it where it must not be."""

import asyncio
import contextlib
import re
import sqlite3
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cipherfleet.computing.engine_wrap import OAEP, unwrap
from cipherfleet.contract.escrow import EscrowRow
from cipherfleet.contract.ids import ConsumerId, KeyId
from cipherfleet.kmc.embedded_hsm import EmbeddedHsm
from cipherfleet.kmc.hsm import Label
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.support import Consumer, TestCloud


@dataclass
class KeyChain:
    """Plaintexts, 32 bytes each. ``deks``: by key id, AES-256 keys."""

    hsm_share: bytes
    ukey_share: bytes
    cmk: bytes
    wrapping: bytes
    deks: dict[str, bytes] = field(default_factory=dict)

    def secrets(self) -> dict[str, bytes]:
        return {"CMK": self.cmk, "wrapping key": self.wrapping, **{f"DEK {k}": v for k, v in self.deks.items()}}


def hkdf(material: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt, info).derive(material)


def cmk_of(hsm_share: bytes, ukey_share: bytes, consumer: str) -> bytes:
    return hkdf(hsm_share + ukey_share, b"cipherfleet cmk v1", consumer.encode())


def wrapping_of(cmk: bytes) -> bytes:
    return hkdf(cmk, b"", b"cipherfleet dek wrap v1")


def open_hsm(cloud: TestCloud) -> EmbeddedHsm:
    """The HSM's keys, from its file and passphrase: what its operator can always do with an embedded one."""
    folder = cloud.cloud.state / "hsm"
    return EmbeddedHsm.open(folder, (folder / "passphrase").read_text().strip(), cloud.settings)


def hsm_keys(cloud: TestCloud) -> dict[str, bytes]:
    """Root key, signing key and the CAs' private keys by label, 32 bytes each, as they stand in memory.

    OpenSSL keeps a private scalar as a number: least significant byte first on all machines that we run on.
    """
    found: dict[str, bytes] = {}
    for key in open_hsm(cloud)._keys.values():
        private = key.private
        found[key.label] = key.material() if private is None else private.private_numbers().private_value.to_bytes(32, "little")
    return found


def reversed_too(keys: dict[str, bytes]) -> dict[str, bytes]:
    """With each key's bytes from the other end as well: PKCS#8 has the most significant one first."""
    return keys | {f"{name}, reversed": key[::-1] for name, key in keys.items()}


async def unwrap_share(hsm: EmbeddedHsm, ciphertext_cmk: bytes, label: str) -> bytes:
    """The HSM share, by rewrapping it to a key of ours."""
    own = rsa.generate_private_key(65537, 3072)
    spki = own.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    handle = await hsm.find(Label(label))
    assert handle is not None
    return own.decrypt(await hsm.rewrap(handle, ciphertext_cmk, spki), OAEP)


def rows_of(cloud: TestCloud, consumer: str) -> list[EscrowRow]:
    """The escrow's rows, straight from the KMC's disk."""
    [database] = (cloud.cloud.state / "kmc").glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        found = connection.execute("select consumer, key, version, attributes, wrapped from rows where consumer = ?", (consumer,))
        return [EscrowRow(ConsumerId(c), KeyId(k), v, a, w) for c, k, v, a, w in found]


ROOT_LABEL = "root-key"
_MARKER = "marker"


def key_chain(cloud: TestCloud, consumer: Consumer) -> KeyChain:
    """Everything, from Ukey + PIN + HSM + database together."""

    async def shares() -> tuple[bytes, bytes]:
        with DirectoryUkey.open(consumer.ukey, consumer.pin) as ukey:
            ukey_share = bytes(ukey._unlocked().share)
            return await unwrap_share(open_hsm(cloud), await ukey.ciphertext_cmk(), ROOT_LABEL), ukey_share

    hsm_share, ukey_share = asyncio.run(shares())
    cmk = cmk_of(hsm_share, ukey_share, consumer.name)
    chain = KeyChain(hsm_share, ukey_share, cmk, wrapping_of(cmk))
    for row in rows_of(cloud, consumer.name):
        if row.version > 0:
            chain.deks[row.key] = bytes(unwrap(bytearray(chain.wrapping), ConsumerId(consumer.name), row))
    return chain


def in_memory(pid: int, needles: dict[str, bytes]) -> set[str]:
    """The names of the needles that stand in a process's memory (needs root).

    Every process of ours holds the package's name: one in which not even that is found was not really searched.
    """
    needles = {**needles, _MARKER: b"cipherfleet"}
    found: set[str] = set()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+\s*(.*)", line)
            if match is None or match[3] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
                continue
            start, end = int(match[1], 16), int(match[2], 16)
            with contextlib.suppress(OSError, ValueError):
                memory.seek(start)
                while start < end:
                    # One window overlaps the next, so that a needle across the border is found.
                    block = memory.read(min(end - start, 16 * 1024 * 1024))
                    if not block:
                        break
                    found |= {name for name, needle in needles.items() if needle in block}
                    start += len(block)
                    if start < end:
                        start -= 64
                        memory.seek(start)
    assert _MARKER in found, f"the memory of process {pid} could not be read"
    return found - {_MARKER}


def in_bytes(contents: Iterable[bytes], needles: dict[str, bytes]) -> set[str]:
    """The names of the needles that stand in any of ``contents``, raw, as hex or as base64."""
    forms = {name: (n, n.hex().encode(), b64encode(n).rstrip(b"=")) for name, n in needles.items()}
    return {name for content in contents for name, shapes in forms.items() if any(shape in content for shape in shapes)}


def in_files(folder: Path, needles: dict[str, bytes]) -> set[str]:
    """The same of any file below ``folder``."""
    return in_bytes((path.read_bytes() for path in folder.rglob("*") if path.is_file()), needles)
