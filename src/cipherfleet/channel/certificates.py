"""Certificates of a process: its key, its request, its chain, and who a peer's certificate says it is."""

import hashlib
import ipaddress
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from cipherfleet.contract.errors import CertificateExpired, CertificateInvalid
from cipherfleet.contract.identities import Identity, Peer
from cipherfleet.contract.ids import Serial
from cipherfleet.state.files import write_private

HPKE_KEY_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.9999.1")
"""Certificate extension of a card: its raw HPKE public key, ML-KEM-768 (1184 bytes) || X25519 (32 bytes)."""


class Credentials(msgspec.Struct, frozen=True):
    """A private key (PKCS#8 PEM), its certificate chain (PEM, leaf first) and the trusted CAs (PEM)."""

    key: bytes
    chain: bytes
    trust: bytes

    def __repr__(self) -> str:
        return f"Credentials({leaf(self.chain).subject.rfc4514_string()})"

    @property
    def identity(self) -> Identity:
        return identity_of(leaf(self.chain))

    @property
    def not_after(self) -> float:
        """Unix seconds."""
        return leaf(self.chain).not_valid_after_utc.timestamp()

    def left(self) -> float:
        """For how many seconds it is still valid; 0 also while it is not valid yet, after the wall clock was set back."""
        certificate, now = leaf(self.chain), datetime.now(UTC)
        if now < certificate.not_valid_before_utc:
            return 0.0
        return max(0.0, (certificate.not_valid_after_utc - now).total_seconds())

    def save(self, folder: Path) -> None:
        """``key.pem`` (mode 0600), ``chain.pem``, ``trust.pem``, each replaced atomically."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in (("key.pem", self.key), ("chain.pem", self.chain), ("trust.pem", self.trust)):
            write_private(folder / name, content)

    @staticmethod
    def load(folder: Path) -> "Credentials":
        return Credentials(*((folder / name).read_bytes() for name in ("key.pem", "chain.pem", "trust.pem")))


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def make_request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, identity: Identity) -> bytes:
    """A PKCS#10 request (DER) for ``identity``; the CA decides what goes into the certificate."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.uri[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def warm_up() -> None:
    """Have the library set up what keys and signatures need, without a key or a random number: for a process that forks."""
    generator = ec.EllipticCurvePublicNumbers(
        0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
        0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
        ec.SECP256R1(),
    ).public_key()
    with suppress(InvalidSignature):
        generator.verify(b"", public_key_der(generator), ec.ECDSA(hashes.SHA256()))


def public_key_der(key: object) -> bytes:
    """SubjectPublicKeyInfo, DER, of any public key."""
    encoded: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


def fingerprint(spki: bytes) -> str:
    """Hex SHA-256 of a SubjectPublicKeyInfo: the name of a signer."""
    return hashlib.sha256(spki).hexdigest()


def split(pem: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM file, in order. Raises ``CertificateInvalid``."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as exc:
        raise CertificateInvalid("a certificate chain cannot be read") from exc


def leaf(chain: bytes) -> x509.Certificate:
    return split(chain)[0]


def to_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def identity_of(certificate: x509.Certificate) -> Identity:
    """Who a certificate names: exactly one URI SAN of ours. Raises ``CertificateInvalid``."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as exc:
        raise CertificateInvalid("the certificate names nobody") from exc
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise CertificateInvalid("the certificate must name exactly one identity")
    return Identity.parse(uris[0])


def serial_of(certificate: x509.Certificate) -> Serial:
    return Serial(f"{certificate.serial_number:x}")


def peer_of(der: bytes) -> Peer:
    """The peer of a finished handshake."""
    certificate = x509.load_der_x509_certificate(der)
    return Peer(
        identity_of(certificate),
        serial_of(certificate),
        hashlib.sha256(public_key_der(certificate.public_key())).digest(),
        certificate.not_valid_after_utc.timestamp(),
    )


def check_chain(chain: bytes, trust: bytes, *, now: float | None = None) -> x509.Certificate:
    """The leaf of a chain that leads to one of ``trust``, every link valid now.

    For certificates met outside a handshake (a card's). Raises ``CertificateExpired`` or ``CertificateInvalid``.
    """
    moment = datetime.fromtimestamp(time.time() if now is None else now, UTC)
    certificates, anchors = split(chain), split(trust)
    if len(certificates) > 4:
        raise CertificateInvalid("a certificate chain is too long")
    for index, certificate in enumerate(certificates):
        if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
            raise CertificateExpired(f"the certificate of {certificate.subject.rfc4514_string()} is not valid now")
        if certificate in anchors:
            return certificates[0]
        following = certificates[index + 1 : index + 2]
        for issuer in [*following, *anchors]:
            if issuer.subject == certificate.issuer and _may_issue(issuer):
                break
        else:
            raise CertificateInvalid("the certificate chain does not lead to a trusted CA")
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError) as exc:
            raise CertificateInvalid("a certificate of the chain is not signed by its issuer") from exc
        if issuer in anchors:
            if not issuer.not_valid_before_utc <= moment <= issuer.not_valid_after_utc:
                raise CertificateExpired("the trusted CA's certificate is not valid now")
            return certificates[0]
    raise CertificateInvalid("the certificate chain does not lead to a trusted CA")


def _may_issue(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def alternative_names(identity: Identity, addresses: Iterable[str]) -> x509.SubjectAlternativeName:
    """The SANs of a certificate: the identity's URI and DNS name, and the addresses it serves on."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri), x509.DNSName(identity.dns_name)]
    try:
        names += [x509.IPAddress(ipaddress.ip_address(a)) for a in addresses]
    except ValueError as exc:
        raise CertificateInvalid("a certificate request names something that is not an IP address") from exc
    return x509.SubjectAlternativeName(names)
