"""The certification authority: root, platform CA, one CA per security domain, and the leaves of every role (RFC 5280).

It builds certificates; recording them is the caller's transaction, and a certificate that is not recorded is worth nothing
at the KMC's door.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cipherfleet.channel.certificates import HPKE_KEY_OID, alternative_names, fingerprint, public_key_der, serial_of, split
from cipherfleet.contract.errors import CertificateInvalid, ConsumerUnknown, FileProblem
from cipherfleet.contract.identities import CONSUMER_ROLES, Identity, Role
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.messages import Chain
from cipherfleet.kmc.hsm import Hsm, KeyHandle, Label, ensure_key_pair
from cipherfleet.kmc.hsm_keys import HsmPrivateKey
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.requests import SubjectKey

ROOT, PLATFORM = "root-ca", "platform-ca"
BACKDATE = timedelta(minutes=5)
MAX_ADDRESSES = 8
_ROOT_DAYS, _CA_DAYS = 30 * 365, 20 * 365
UKEY_DAYS = 10 * 365
STATEMENT_USAGE_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.9999.2")
"""Extended key usage of Ukeys (they sign statements) and cards (they unwrap): neither is a TLS certificate."""


def domain_label(consumer: ConsumerId) -> Label:
    return Label(f"domain-ca/{consumer}")


class CertificateAuthority(msgspec.Struct, frozen=True):
    """One CA: its certificate, and its key's face."""

    certificate: x509.Certificate
    key: HsmPrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


class Certification:
    """All CAs of this cloud. ``add`` those that the database knows, ``make`` the missing ones, ``issue`` leaves."""

    def __init__(self, hsm: Hsm, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._hsm, self._wall_clock = hsm, wall_clock
        self._authorities: dict[str, CertificateAuthority] = {}

    @property
    def root_pem(self) -> bytes:
        return self._authorities[ROOT].pem

    def domain_pem(self, consumer: ConsumerId) -> bytes:
        return self._domain(consumer).pem

    async def add(self, name: str, pem: bytes) -> None:
        """A CA that was made before. Raises ``FileProblem`` when the HSM does not hold its key."""
        certificate = split(pem)[0]
        handle = await self._hsm.find(Label(name))
        public_key = await self._hsm.public_key(handle) if handle is not None else b""
        if handle is None or public_key != public_key_der(certificate.public_key()):
            raise FileProblem(f"the HSM does not hold the key of {name}", "start the KMC with the HSM that it was made with")
        self._authorities[name] = CertificateAuthority(certificate, self._key(handle, public_key))

    async def make(self, name: str) -> bytes:
        """The PEM of a new CA certificate, to be stored and then ``add``-ed. Its key is made in the HSM, or found there."""
        handle = await ensure_key_pair(self._hsm, Label(name))
        public_key = await self._hsm.public_key(handle)
        key = self._key(handle, public_key)
        subject = _name(f"Cipherfleet {name} {fingerprint(public_key)[:8]}")
        if name == ROOT:
            certificate = await self._build_ca(subject, key, subject, key, path_length=1, days=_ROOT_DAYS)
        else:
            root = self._authorities[ROOT]
            certificate = await self._build_ca(subject, key, root.certificate.subject, root.key, path_length=0, days=_CA_DAYS)
        return certificate.public_bytes(Encoding.PEM)

    def drop(self, name: str) -> None:
        self._authorities.pop(name, None)

    async def issue(
        self, identity: Identity, key: SubjectKey, *, not_after: float, addresses: Iterable[str] = (), hpke_public_key: bytes = b""
    ) -> Issued:
        """A leaf certificate for ``identity``. Raises ``CertificateInvalid``, ``ConsumerUnknown`` or ``HsmUnavailable``."""
        issuer = self._issuer(identity)
        addresses = tuple(addresses)
        if len(addresses) > MAX_ADDRESSES:
            raise CertificateInvalid(f"a certificate names at most {MAX_ADDRESSES} addresses")
        now = datetime.fromtimestamp(self._wall_clock(), UTC)
        end = min(datetime.fromtimestamp(math.ceil(not_after), UTC), issuer.certificate.not_valid_after_utc)
        builder = (
            _builder(_name(identity.uri[:64]), key, issuer.certificate.subject, now, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_leaf_usage(identity.role), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_extended_usage(identity.role)), critical=False)
            .add_extension(alternative_names(identity, addresses), critical=False)
            .add_extension(_authority_identifier(issuer.certificate), critical=False)
        )
        if hpke_public_key:
            builder = builder.add_extension(x509.UnrecognizedExtension(HPKE_KEY_OID, hpke_public_key), critical=False)
        certificate = await _sign(builder, issuer.key)
        spki_sha256 = hashlib.sha256(public_key_der(key)).digest()
        return Issued(serial_of(certificate), identity, spki_sha256, end.timestamp(), certificate.public_bytes(Encoding.PEM))

    def chain(self, issued: Issued) -> Chain:
        """The leaf with its CA, and what its owner shall trust: its own domain alone, or the root."""
        role = issued.identity.role
        issuer = self._issuer(issued.identity)
        trust = issuer.pem if role in (Role.VCM, Role.APPLICATION) else self.root_pem
        return Chain(issued.pem + issuer.pem, trust)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _key(self, handle: KeyHandle, public_key: bytes) -> HsmPrivateKey:
        return HsmPrivateKey(self._hsm, handle, public_key, asyncio.get_running_loop())

    def _issuer(self, identity: Identity) -> CertificateAuthority:
        return self._domain(identity.consumer) if identity.role in CONSUMER_ROLES else self._authorities[PLATFORM]

    def _domain(self, consumer: ConsumerId) -> CertificateAuthority:
        authority = self._authorities.get(domain_label(consumer))
        if authority is None:
            raise ConsumerUnknown(f"no consumer is called {consumer}")
        return authority

    async def _build_ca(
        self, subject: x509.Name, key: HsmPrivateKey, issuer: x509.Name, issuer_key: HsmPrivateKey, *, path_length: int, days: int
    ) -> x509.Certificate:
        now = datetime.fromtimestamp(self._wall_clock(), UTC)
        builder = (
            _builder(subject, key.public_key(), issuer, now, now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_ca_usage(), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        return await _sign(builder, issuer_key)


async def _sign(builder: x509.CertificateBuilder, key: HsmPrivateKey) -> x509.Certificate:
    return await asyncio.to_thread(builder.sign, key, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, key: SubjectKey, issuer: x509.Name, now: datetime, end: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )


def _usage(**on: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: on.get(name, False) for name in names})


def _ca_usage() -> x509.KeyUsage:
    return _usage(key_cert_sign=True, crl_sign=True)


def _leaf_usage(role: Role) -> x509.KeyUsage:
    return _usage(key_encipherment=True) if role is Role.CARD else _usage(digital_signature=True)


def _extended_usage(role: Role) -> list[x509.ObjectIdentifier]:
    match role:
        case Role.UKEY | Role.CARD:
            return [STATEMENT_USAGE_OID]
        case Role.OPERATOR | Role.TERMINAL | Role.APPLICATION:
            return [ExtendedKeyUsageOID.CLIENT_AUTH]
        case _:
            return [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
