"""A certification authority for tests: the same shape as the real one, with keys in memory."""

import asyncio
import socket
import ssl
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cipherfleet.channel import tls
from cipherfleet.channel.certificates import HPKE_KEY_OID, Credentials, alternative_names, key_to_pem, new_key, to_pem
from cipherfleet.contract.identities import Identity

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def leaf_builder(
    uri: str, public_key: PublicKey, issuer: x509.Name, issuer_key: ec.EllipticCurvePublicKey, lifetime: timedelta = timedelta(hours=1)
) -> x509.CertificateBuilder:
    """An application's or process's certificate, to be signed by whoever holds the CA's key."""
    now = datetime.now(UTC)
    identity = Identity.parse(uri)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, uri[:64])]))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .add_extension(alternative_names(identity, ()), critical=False)
    )


class Authority:
    """A CA: ``Authority("root")`` signs itself, ``root.subordinate("acme")`` is an intermediate."""

    def __init__(self, name: str, parent: "Authority | None" = None) -> None:
        self.key = new_key()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.parent = parent
        issuer = parent or self
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1 if parent is None else 0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
            .sign(issuer.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return to_pem([self.certificate])

    def subordinate(self, name: str) -> "Authority":
        return Authority(name, self)

    def certify(
        self,
        identity: Identity,
        public_key: PublicKey,
        *,
        addresses: tuple[str, ...] = ("127.0.0.1",),
        lifetime: timedelta = timedelta(hours=1),
        not_before: datetime | None = None,
        hpke_public_key: bytes | None = None,
    ) -> bytes:
        """The PEM chain of a leaf, this CA included unless it is the root."""
        start = not_before or datetime.now(UTC) - timedelta(minutes=5)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.uri[:64])]))
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(minutes=5) + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .add_extension(alternative_names(identity, addresses), critical=False)
        )
        if hpke_public_key is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(HPKE_KEY_OID, hpke_public_key), critical=False)
        leaf = builder.sign(self.key, hashes.SHA256())
        return to_pem([leaf] if self.parent is None else [leaf, self.certificate])

    def credentials(
        self,
        identity: Identity,
        *,
        trust: bytes | None = None,
        lifetime: timedelta = timedelta(hours=1),
        addresses: tuple[str, ...] = ("127.0.0.1",),
        not_before: datetime | None = None,
    ) -> Credentials:
        """A fresh key and certificate; trusts the root unless told otherwise."""
        key = new_key()
        top: Authority = self
        while top.parent is not None:
            top = top.parent
        chain = self.certify(identity, key.public_key(), lifetime=lifetime, addresses=addresses, not_before=not_before)
        return Credentials(key_to_pem(key), chain, trust if trust is not None else top.pem)


async def refused_in_handshake(url: str, credentials: Credentials) -> bool:
    """Whether a server ends the connection when it has seen the certificate. No request is sent, and we check nothing ourselves."""
    host, port = url.removeprefix("https://").split(":")
    context = tls.client_context(credentials)
    context.check_hostname = False

    def look() -> bool:
        with socket.create_connection((host, int(port)), timeout=5) as plain, context.wrap_socket(plain) as connection:
            connection.settimeout(0.5)
            try:  # with TLS 1.3 the client is ready before the server has looked at its certificate
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except (ssl.SSLError, ConnectionError):
                return True

    return await asyncio.to_thread(look)
