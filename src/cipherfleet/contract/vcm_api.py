"""A VCM as its consumer sees it: messages of the login and of the network components.

::

    terminal     POST /v1/login                             Signed[LoginStatement] -> LoginReply
    application  the network components: see services.components
"""

import msgspec

from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.escrow import Consent
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, CardId, KeyId, VcmId
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.messages import Message
from cipherfleet.contract.statements import Signed

MAX_KEYS_AT_ONCE = 1000
"""In one page, or in one batch."""
RSA_KEYS_AT_ONCE = {2048: 64, 3072: 16, 4096: 8}
"""By the modulus' bits: finding primes takes up to some seconds for a key on a busy host, and a caller waits for the whole batch."""


def keys_at_once(chosen: Algorithm) -> int:
    """How many keys of an algorithm are made in one batch."""
    return RSA_KEYS_AT_ONCE.get(chosen.key_bits, 1) if chosen.family == "RSA" else MAX_KEYS_AT_ONCE


class LoginReply(Message, frozen=True):
    """``confirmation``: HMAC-SHA-256, keyed from the Ukey share, over "cipherfleet card confirm v1", card, vcm and nonce.

    Until the card holds CMK and lease, the VCM answers 503 ``service-off`` and the terminal asks again.
    """

    vcm: VcmId
    card: CardId
    confirmation: bytes
    lease_s: float


class KeyCreateRequest(Message, frozen=True):
    algorithm: str
    label: str = ""
    bare: bool = False  # an AEAD key whose ciphertexts are what its standard says: nonce || ciphertext || tag
    terms: KeyTerms = NO_TERMS
    tags: dict[str, str] = msgspec.field(default_factory=dict)


class KeyDeriveRequest(Message, frozen=True):
    """A new key of a symmetric algorithm that the path's key gives: the same key for the same algorithm, context and salt."""

    algorithm: str
    context: bytes
    salt: bytes = b""
    label: str = ""
    bare: bool = False
    terms: KeyTerms = NO_TERMS


class ImportTarget(Message, frozen=True):
    """Where key material is to be sealed to: ``chain`` is the card's certificate, PEM, under the root that the profile names."""

    vcm: VcmId
    card: CardId
    chain: bytes


class KeyImportRequest(Message, frozen=True):
    """``sealed``: ``contract.vcc.KeyMaterial``, HPKE to the card (``channel.sealing.import_info``)."""

    algorithm: str
    sealed: bytes
    label: str = ""
    bare: bool = False
    terms: KeyTerms = NO_TERMS
    tags: dict[str, str] = msgspec.field(default_factory=dict)


class KeyDescription(Message, frozen=True):
    id: KeyId
    algorithm: str
    version: int
    state: str
    label: str
    created_at: float
    created_by: str
    uses: tuple[str, ...]
    versions: tuple[int, ...] = ()
    public_key: bytes = b""  # SubjectPublicKeyInfo DER of the current version; of HPKE's hybrid the raw keys, ML-KEM's first
    imported: bool = False  # the current version was not made in a card
    bare: bool = False  # its ciphertexts are bare: no header names key and version
    last_used_at: float | None = None  # in `show` alone: unix seconds, as VCMs and KMC have told, a little late
    uses_counted: int | None = None  # likewise
    policy: str = ""  # what the consumer's policy says of new data under it: "NAME: allowed", "NAME: refused by rule ..."
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    delete_at: float | None = None  # when it is destroyed, or was: unix seconds
    terms: KeyTerms = NO_TERMS
    used: int = 0  # uses that VCMs have reserved, of keys that count them
    next_rotation_at: float | None = None
    consent: Consent | None = None  # what a first person wants destroyed, and a second has not yet agreed to


class KeysCreateRequest(Message, frozen=True):
    """One key for each label, 1 to ``keys_at_once`` of the algorithm, all or none; all of the same terms and tags."""

    algorithm: str
    labels: tuple[str, ...]
    bare: bool = False
    terms: KeyTerms = NO_TERMS
    tags: dict[str, str] = msgspec.field(default_factory=dict)


class KeysImportRequest(Message, frozen=True):
    """1 to ``MAX_KEYS_AT_ONCE``, all or none; each sealed to the same card."""

    keys: tuple[KeyImportRequest, ...]


class KeyQuery(Message, frozen=True):
    """Which keys, and which page of them: ``label`` is how theirs begin, the others are whole; empty is any.

    Without any of these the list is complete, in the order of creation. With them it is what the KMC's index finds (with a
    label in the order of labels): each is checked, but the KMC could leave one out. ``after``: ``next`` of the last page.
    """

    label: str = ""
    state: str = ""
    algorithm: str = ""
    terms: tuple[str, ...] = ()
    after: str = ""
    limit: int = 100

    @property
    def everything(self) -> bool:
        return not (self.label or self.state or self.algorithm or self.terms)


class KeyListReply(Message, frozen=True):
    """``next``: the token of the next page, empty at the end."""

    keys: tuple[KeyDescription, ...]
    next: str = ""


class DeletionRequest(Message, frozen=True):
    """``days`` until the key is destroyed; ``None`` for the default."""

    days: float | None = None


class TrimRequest(Message, frozen=True):
    """Destroy the versions below ``before``."""

    before: int


class ImportParametersRequest(Message, frozen=True):
    algorithm: str
    bits: int = 4096  # of the RSA key to wrap to: 3072 or 4096
    bare: bool = False


class ImportParameters(Message, frozen=True):
    """A key's id, and the RSA key (SubjectPublicKeyInfo DER) to wrap its material to: one import, until ``expires_at``."""

    key: KeyId
    algorithm: str
    public_key: bytes
    token: bytes
    expires_at: float
    mechanism: str = "RSA_AES_KEY_WRAP_SHA_256"


class WrappedImportRequest(Message, frozen=True):
    """``wrapped``: by RSA-OAEP with SHA-256 at once, or an AES key so, and behind it the material under it (RFC 5649)."""

    token: bytes
    wrapped: bytes
    label: str = ""
    terms: KeyTerms = NO_TERMS


class ExportAsk(Message, frozen=True):
    """Either an RSA ``public_key`` (SubjectPublicKeyInfo DER), or a ``wrapping_key`` of AES-256-KWP."""

    public_key: bytes = b""
    wrapping_key: str = ""
    version: int | None = None


class ExportReply(Message, frozen=True):
    key: KeyId
    version: int
    algorithm: str
    mechanism: str
    wrapped: bytes


class AliasEntry(Message, frozen=True):
    """``name`` is without ``alias/``, which goes before it where a key is named."""

    name: str
    key: KeyId


class AliasListReply(Message, frozen=True):
    aliases: tuple[AliasEntry, ...]


class AliasRequest(Message, frozen=True):
    """``key``: an id, or the ``alias/NAME`` of another alias."""

    key: str


class DataKeyReply(Message, frozen=True):
    key: KeyId
    version: int
    ciphertext: bytes
    plaintext: bytes | None = None


class SignatureReply(Message, frozen=True):
    key: KeyId
    version: int
    algorithm: str
    signature: bytes


class SecretReply(Message, frozen=True):
    """A secret that was agreed on, derived or decapsulated: here and nowhere else."""

    key: KeyId
    version: int
    secret: bytes


class EncapsulationReply(Message, frozen=True):
    key: KeyId
    version: int
    secret: bytes  # 32 bytes
    ciphertext: bytes  # for the holder of the private key


class ReceiptReply(Message, frozen=True):
    """``receipt``: a ``DestructionStatement``; ``signer``: whose signature it is, SubjectPublicKeyInfo DER, as the Ukey has it."""

    receipt: Signed
    signer: bytes


class Delegation(Message, frozen=True):
    """What an application gave another one. ``state``: active, or revoked; or void: the delegator may not delegate it (any more)."""

    delegator: ApplicationName
    delegate: ApplicationName
    key: KeyId
    grants: tuple[Grant, ...]
    state: str
    sequence: int


class DelegationsReply(Message, frozen=True):
    """``next``: the number that the caller's next statement on delegation is to have."""

    key: KeyId
    delegations: tuple[Delegation, ...]
    next: int


class EndpointsReply(Message, frozen=True):
    endpoints: tuple[str, ...]
