"""Certificate requests from outside: only the key counts, and only after it was shown to be held and to be strong enough."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cipherfleet.contract.errors import Malformed, SignatureInvalid, Unsupported
from cipherfleet.contract.identities import Role

MAX_REQUEST_BYTES = 16 * 1024

SubjectKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def subject_key(request: bytes, role: Role) -> SubjectKey:
    """The public key of a PKCS#10 request (DER), fit for ``role``.

    P-256 among ourselves, RSA-3072 for a card's transport key; an application may also bring P-384, Ed25519, RSA-3072 or
    RSA-4096. Raises ``Malformed``, ``SignatureInvalid`` or ``Unsupported``.
    """
    if len(request) > MAX_REQUEST_BYTES:
        raise Malformed(f"a certificate request has at most {MAX_REQUEST_BYTES} bytes")
    try:
        parsed = x509.load_der_x509_csr(request)
        valid = parsed.is_signature_valid
        key = parsed.public_key()
    except UnsupportedAlgorithm as exc:
        raise Unsupported("the certificate request uses an algorithm that is not supported") from exc
    except (ValueError, TypeError) as exc:
        raise Malformed("the certificate request cannot be read") from exc
    if not valid:
        raise SignatureInvalid("the certificate request is not signed by its own key")
    if not _fits(key, role):
        raise Unsupported(f"a certificate for {role} needs another kind or strength of key", "P-256 is right, a card has RSA-3072")
    assert isinstance(key, SubjectKey)  # noqa: S101 - for the type checker: _fits knows no others
    return key


def _fits(key: object, role: Role) -> bool:
    if role is Role.CARD:
        return isinstance(key, rsa.RSAPublicKey) and key.key_size == 3072 and key.public_numbers().e == 65537
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, ec.SECP256R1) or (role is Role.APPLICATION and isinstance(key.curve, ec.SECP384R1))
    if role is not Role.APPLICATION:
        return False
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size in (3072, 4096) and key.public_numbers().e == 65537
    return isinstance(key, ed25519.Ed25519PublicKey)
