"""Signing and checking statements: ECDSA P-256 with SHA-256 over DSSE's pre-authentication encoding."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import fingerprint, public_key_der
from cipherfleet.contract.errors import StatementForged
from cipherfleet.contract.statements import Signature, Signed, Statement, signing_input

S = TypeVar("S", bound=Statement)

MAX_STATEMENT_BYTES = 64 * 1024


class Signer(Protocol):
    """Something that signs with a key it does not give away: a Ukey, an HSM."""

    @property
    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo, DER, of a P-256 key."""
        ...

    async def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over ``data``, DER."""
        ...


class LocalSigner:
    """A signer whose key is in this process: the directory Ukey, tests."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public_key = public_key_der(key.public_key())

    async def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


async def sign(statement: Statement, signer: Signer) -> Signed:
    """A new envelope with one signature."""
    return await countersign(Signed(statement.KIND, codec.encode(statement)), signer)


async def countersign(signed: Signed, signer: Signer) -> Signed:
    """The envelope with one signature more, over the same bytes."""
    value = await signer.sign(signing_input(signed.kind, signed.payload))
    return Signed(signed.kind, signed.payload, (*signed.signatures, Signature(fingerprint(signer.public_key), value)))


def verify(signed: Signed, kind: type[S], keys: Iterable[bytes]) -> S:
    """The statement, if one of ``keys`` (SubjectPublicKeyInfo DER) signed exactly these bytes as a ``kind``.

    Raises ``StatementForged``; ``Malformed`` when a good signature is over something else than a ``kind``.
    """
    if signed.kind != kind.KIND or len(signed.payload) > MAX_STATEMENT_BYTES or len(signed.signatures) > 4:
        raise StatementForged(f"this is not a statement of kind {kind.KIND}")
    data = signing_input(signed.kind, signed.payload)
    for spki in keys:
        signer = fingerprint(spki)
        for signature in signed.signatures:
            if signature.signer == signer and _valid(spki, signature.value, data):
                return codec.decode(signed.payload, kind, what=f"statement {kind.KIND}")
    raise StatementForged(f"the statement {kind.KIND} is not signed by the key it needs")


def _valid(spki: bytes, signature: bytes, data: bytes) -> bool:
    try:
        key = serialization.load_der_public_key(spki)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True
