"""The virtual crypto card: the port between a VCM and the one card that does its cryptography.

A request is a fixed-size descriptor that says where its parameters (JSON of the operation's struct below) and its data lie;
the answer is a completion. They travel over two rings in shared memory; whatever else carries them implements ``VirtualCryptoCard``.

Long input is a *stream*: ``BEGIN`` with a verb, ``UPDATE`` with data, ``FINISH`` with the last data. ``RUN`` is begin and
finish in one. Keys are named by *handle*, which is valid on this vCC alone, until ``UNLOAD``, ``DROP`` or the lease's end.
"""

import struct
from enum import IntEnum, StrEnum
from typing import Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from cipherfleet.contract.errors import ErrorBody, Malformed
from cipherfleet.contract.ids import CardId, ConsumerId, KeyId, VcmId
from cipherfleet.contract.policy import INTERNATIONAL, Policy

CHUNK_BYTES = 64 * 1024
MAX_DATA_BYTES = 4 * 1024 * 1024
MAX_SUBMIT_BYTES = MAX_DATA_BYTES + 64 * 1024  # a whole ciphertext of MAX_DATA_BYTES
MAX_PARAMETER_BYTES = 256 * 1024
MAX_STREAMS = 256
MAX_BATCH = 1000


class Operation(IntEnum):
    """What a descriptor asks for. In comments: parameters -> result (value; parameters; data)."""

    NULL = 0  # -> data echoed length 0
    DESCRIBE = 1  # -> CardDescription
    LOAD_CMK = 2  # CmkDelivery -> nothing: both shares are combined in the card, service still waits for a lease
    LEASE_NONCE = 3  # -> data: 16 bytes, fresh
    LEASE = 4  # Signed (LeaseStatement: the Ukey's and the KMC's signature) -> LeaseState
    CONFIRM = 5  # data: 32-byte nonce -> data: 32-byte MAC that only a card with this Ukey's share can make
    VERIFY_STATEMENT = 6  # Signed -> data: the payload, after the consumer's Ukey signature was checked
    DROP = 7  # everything of this consumer is zeroised, at once
    GENERATE = 8  # RowRequest -> value: handle; parameters: EscrowRow (version >= 1)
    LOAD = 9  # EscrowRow (version >= 1) -> value: handle
    UNLOAD = 10  # handle
    SEAL_ATTRIBUTES = 11  # RowRequest (version 0) -> parameters: EscrowRow
    VERIFY_ATTRIBUTES = 12  # EscrowRow (version 0) -> nothing, or an error
    RANDOM = 13  # RandomRequest -> data
    DATA_KEY = 14  # handle, DataKeyRequest -> parameters: b""; value: length of ciphertext; data: ciphertext || plaintext
    TRANSPORT = 15  # -> data: this card's certificate chain, PEM; what is sealed to the key in it opens here alone
    BEGIN = 16  # handle, StreamRequest -> value: stream; data: header when encrypting
    UPDATE = 17  # stream in ``handle``, data -> data (cipher verbs), else nothing
    FINISH = 18  # stream in ``handle``, last data -> data: last output, digest, tag or signature
    ABORT = 19  # stream in ``handle``
    RUN = 20  # handle, StreamRequest, data -> data: everything at once
    IMPORT = 21  # ImportRequest -> as GENERATE
    IMPORT_KEY = 40  # ImportKeyRequest -> ImportKey: a fresh RSA key to wrap material to, itself sealed in the token
    IMPORT_WRAPPED = 41  # ImportWrappedRequest -> as GENERATE
    EXPORT = 42  # handle, ExportRequest -> data: the key's material, wrapped
    DERIVE_KEY = 23  # DeriveKeyRequest -> as GENERATE
    BATCH = 22  # BatchRequest, data of all items -> parameters: BatchAnswer; data: the results, one after the other


class Verb(StrEnum):
    """What a stream does with the data."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    REENCRYPT = "reencrypt"
    SIGN = "sign"
    VERIFY = "verify"
    MAC = "mac"
    VERIFY_MAC = "verify-mac"
    DIGEST = "digest"
    AGREE = "agree"
    ENCAPSULATE = "encapsulate"
    DECAPSULATE = "decapsulate"
    DERIVE = "derive"


class StreamRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Parameters of BEGIN and RUN.

    ``UPDATE`` of cipher verbs takes whole chunks: ``CHUNK_BYTES`` of plaintext, or ``CHUNK_BYTES + 16`` of ciphertext, any
    number of them up to ``MAX_DATA_BYTES``; ``FINISH`` takes the rest (at most one chunk; ciphertext: at least 16 bytes).

    A *bare* key (``VersionAttributes.bare``, and every key of an algorithm that has no messages) gives and takes what its standard
    says and no more: ``IV || ciphertext || tag``. Bare AEAD, key wrap, public-key encryption, agreement, KEM and derivation
    are ``RUN`` alone; bare CBC and CTR are streams of any length.
    """

    verb: Verb
    context: bytes = b""
    """At most 4 KiB, not stored. Messages and bare AEAD: authenticated. XTS: the 16-byte tweak. OAEP: label. HPKE, DERIVE, AGREE:
    info. ML-DSA: context string (255 bytes). SM2 signatures: the signer's id, if not the usual one."""
    header: bytes = b""  # DECRYPT, REENCRYPT: the ciphertext's first HEADER_BYTES
    signature: bytes = b""  # VERIFY, VERIFY_MAC: what to check
    digest: str = ""  # DIGEST: algorithm name; signatures and OAEP: one of the algorithm's ``digests``, if not the default
    prehashed: bool = False  # SIGN, VERIFY: data is the digest itself
    length: int = 0  # DIGEST of SHAKE, DERIVE: bytes wanted; AGREE: of HKDF-SHA-256 over the shared secret, 0: the secret itself
    salt: bytes = b""  # DERIVE, AGREE
    peer: bytes = b""  # AGREE: the other side's public key, SubjectPublicKeyInfo DER
    target: int = 0  # REENCRYPT: handle of the new key
    target_context: bytes = b""


class BatchItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One item of BATCH: as RUN, with ``length`` bytes of the data."""

    request: StreamRequest
    handle: int = 0
    length: int = 0


class BatchRequest(msgspec.Struct, frozen=True):
    """Parameters of BATCH: 1 to ``MAX_BATCH`` items."""

    items: tuple[BatchItem, ...]


class BatchResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """``length`` bytes of the answer's data, or why there are none."""

    length: int = 0
    error: ErrorBody | None = None


class BatchAnswer(msgspec.Struct, frozen=True):
    results: tuple[BatchResult, ...]


class RowRequest(msgspec.Struct, frozen=True):
    """Parameters of GENERATE and SEAL_ATTRIBUTES: the row to make, but for what the card adds."""

    key: KeyId
    version: int
    attributes: bytes


class DeriveKeyRequest(msgspec.Struct, frozen=True):
    """Parameters of DERIVE_KEY: the row's key is HKDF of the key under the handle ``source``, over its algorithm and ``context``.

    The same each time. At most 4 KiB of context and 1 KiB of salt.
    """

    row: RowRequest
    source: int
    context: bytes
    salt: bytes = b""


class ImportRequest(msgspec.Struct, frozen=True):
    """Parameters of IMPORT. ``sealed``: a ``KeyMaterial``, HPKE with ``channel.sealing.import_info``."""

    row: RowRequest
    sealed: bytes


class ImportToken(msgspec.Struct, frozen=True):
    """``sealed``: nonce(12) || AES-256-GCM over the import key (PKCS#8), with a key of the CMK's; the rest is authenticated."""

    key: KeyId
    algorithm: str
    bare: bool
    expires_at: float  # unix seconds
    sealed: bytes = b""


class ImportKeyRequest(msgspec.Struct, frozen=True):
    token: ImportToken
    bits: int  # 3072 or 4096


class ImportKey(msgspec.Struct, frozen=True):
    """``public_key``: SubjectPublicKeyInfo DER."""

    token: ImportToken
    public_key: bytes


class ImportWrappedRequest(msgspec.Struct, frozen=True):
    """``wrapped``: RSA-OAEP (SHA-256) of the material, or of an AES key and then the material under it (RFC 5649)."""

    row: RowRequest
    token: ImportToken
    wrapped: bytes


class ExportRequest(msgspec.Struct, frozen=True):
    """To an RSA key (SubjectPublicKeyInfo DER), or under the AES-256-KWP key of handle ``wrapping``."""

    public_key: bytes = b""
    wrapping: int = 0


class KeyMaterial(msgspec.Struct, frozen=True):
    """What an application seals to one card: raw bytes of a symmetric key, PKCS#8 DER of a private one."""

    consumer: ConsumerId
    algorithm: str
    material: bytes


class RandomRequest(msgspec.Struct, frozen=True):
    length: int


class DataKeyRequest(msgspec.Struct, frozen=True):
    length: int  # 16 to 64 bytes
    plaintext: bool
    context: bytes = b""


class CmkDelivery(msgspec.Struct, frozen=True):
    """Both shares on their way to one card: RSA-OAEP (SHA-256) from the HSM, HPKE from the terminal."""

    wrapped_hsm_share: bytes
    sealed_ukey_share: bytes


class LeaseState(msgspec.Struct, frozen=True):
    """``expires_at``: ``CLOCK_BOOTTIME`` of the card's host, seconds. The rest: what the Ukey had seen of the escrow."""

    expires_at: float
    remaining_s: float
    epoch: int
    sequence: int
    head: bytes
    policy: Policy = INTERNATIONAL


class CardDescription(msgspec.Struct, frozen=True):
    """What the vCC says of itself. ``loaded``: both shares are combined."""

    card: CardId
    vcm: VcmId
    consumer: ConsumerId
    loaded: bool
    serving: bool
    epoch: int = 0
    sequence: int = 0
    head: bytes = b""  # the newest checkpoint the Ukey had seen (from the sealed share)
    kmc_signing_key: bytes = b""  # SubjectPublicKeyInfo, DER (from the sealed share)
    policy: Policy = INTERNATIONAL  # from the lease in force
    operations: int = 0
    bytes: int = 0
    keys: int = 0


class VccLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one vCC may use of its card. Over its rates requests wait in the ring; ``weight`` is its share beside others that wait."""

    operations_s: Annotated[float, Meta(ge=0, le=1e9, description="operations per second, 0 for any number")] = 0.0
    bytes_s: Annotated[float, Meta(ge=0, le=1e15, description="bytes of data per second, 0 for any number")] = 0.0
    depth: Annotated[int, Meta(ge=1, le=256, description="requests that the engine works on at once")] = 256
    keys: Annotated[int, Meta(ge=0, le=16384, description="loaded keys")] = 16384
    weight: Annotated[float, Meta(ge=0.1, le=100, description="share of the card beside others that wait")] = 1.0


NO_LIMITS = VccLimits()


class VccStatistics(msgspec.Struct, frozen=True):
    """Histograms: entry *n* counts requests that took less than 2**n microseconds, and half of that or more."""

    queue_us: tuple[int, ...] = ()
    service_us: tuple[int, ...] = ()


class Completion(msgspec.Struct, frozen=True):
    value: int = 0
    parameters: bytes = b""
    data: bytes = b""


class VirtualCryptoCard(Protocol):
    """One VCM's share of a card."""

    async def submit(
        self,
        operation: Operation,
        *,
        handle: int = 0,
        parameters: bytes = b"",
        data: "bytes | bytearray | memoryview" = b"",
    ) -> Completion:
        """Run one operation. Raises the ``CipherfleetError`` that the card answered, or ``CardUnavailable``."""
        ...


# -- the rings ---------------------------------------------------------------------------------------------------------
#
# A vCC is one piece of shared memory: a page of counters, the submission ring, the completion ring, and the region that
# payloads lie in (the virtual function's DMA region). Counters are 32 bits, run freely and wrap; each has one writer.

RING_ENTRIES = 256
REGION_BYTES = 16 * 1024 * 1024
COUNTERS_BYTES = 4096

DESCRIPTOR = struct.Struct("<HHIQ6I24x")
"""operation, flags (0), request number, handle; offset and length of parameters, data and the answer's room in the region."""
COMPLETION = struct.Struct("<HHIQII8x")
"""status, flags (0), request number, value, parameter bytes, data bytes; the answer is in the room, parameters first."""

SUBMISSIONS_AT = COUNTERS_BYTES
COMPLETIONS_AT = SUBMISSIONS_AT + RING_ENTRIES * DESCRIPTOR.size
REGION_AT = COMPLETIONS_AT + RING_ENTRIES * COMPLETION.size
MEMORY_BYTES = REGION_AT + REGION_BYTES


class Counter(IntEnum):
    """Where a counter is in the first page, in words of 32 bits: each in a cache line of its own."""

    SUBMITTED = 0  # the VCM: requests put into the ring
    COMPLETED = 32  # the card: completions put into the ring
    SEEN = 48  # the VCM: completions taken out of it
    CARD_SLEEPS = 64  # the card: 1 when it wants its doorbell rung
    VCM_SLEEPS = 80  # the VCM, likewise


class Status(IntEnum):
    DONE = 0
    FAILED = 1  # the answer's parameters are an ``ErrorBody``


class Descriptor(NamedTuple):
    operation: int
    number: int
    handle: int
    parameters_at: int
    parameter_bytes: int
    data_at: int
    data_bytes: int
    room_at: int
    room_bytes: int

    def encode(self) -> bytes:
        return DESCRIPTOR.pack(self.operation, 0, *self[1:])

    @classmethod
    def decode(cls, raw: bytes) -> "Descriptor":
        """Bounds checked. Raises ``Malformed``."""
        operation, flags, *rest = DESCRIPTOR.unpack(raw)
        made = cls(operation, *rest)
        if flags or made.parameter_bytes > MAX_PARAMETER_BYTES or made.data_bytes > MAX_SUBMIT_BYTES:
            raise Malformed("a descriptor is out of bounds")
        for at, length in ((made.parameters_at, made.parameter_bytes), (made.data_at, made.data_bytes), (made.room_at, made.room_bytes)):
            if at + length > REGION_BYTES:
                raise Malformed("a descriptor reaches out of its region")
        return made
