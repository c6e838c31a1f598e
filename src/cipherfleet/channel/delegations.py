"""A delegation as it is signed and read: by the delegator's own certificate key."""

import hashlib
import hmac

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cipherfleet.channel import codec, signing
from cipherfleet.contract.errors import CertificateInvalid, Malformed, StatementForged, Unsupported
from cipherfleet.contract.grants import check_delegated
from cipherfleet.contract.statements import ApplicationStatement, DelegationStatement, Signed

MAX_STATEMENT_BYTES = 16 * 1024


def own_signer(key_pem: bytes) -> signing.LocalSigner:
    """What an application signs with: the key of its certificate, PKCS#8 PEM. Raises ``CertificateInvalid`` or ``Unsupported``."""
    try:
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise CertificateInvalid("the private key in the profile cannot be read") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Unsupported("an application delegates with a key on P-256", "sign it in with one: cipherfleet app add")
    return signing.LocalSigner(key)


def read_delegation(signed: Signed) -> DelegationStatement:
    """That a delegation is whole and signed by the key it names. Raises ``StatementForged`` or ``Malformed``."""
    if len(signed.signatures) != 1 or len(signed.payload) > MAX_STATEMENT_BYTES or signed.kind != DelegationStatement.KIND:
        raise StatementForged("this is no delegation with its delegator's signature alone")
    named = codec.decode(signed.payload, DelegationStatement, what="the delegation")
    statement = signing.verify(signed, DelegationStatement, (named.public_key,))
    if statement.delegator == statement.delegate:
        raise Malformed("an application delegates to another one")
    if statement.revoked:
        if statement.grants:
            raise Malformed("what is taken back gives nothing")
    else:
        check_delegated(statement.grants, statement.key)
    return statement


def is_signed_by(statement: DelegationStatement, own: ApplicationStatement) -> bool:
    """Whether a delegation that was read carries the signature of the key that the Ukey signed its delegator in with."""
    return hmac.compare_digest(own.public_key_sha256, hashlib.sha256(statement.public_key).digest())
