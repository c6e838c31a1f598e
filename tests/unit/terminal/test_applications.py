"""Signing applications in."""

import hashlib
import time
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID
from msgspec import structs

from cipherfleet.channel.certificates import Credentials, check_chain, identity_of, make_request, new_key, public_key_der
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import (
    CertificateInvalid,
    CheckpointForged,
    CipherfleetError,
    EscrowRolledBack,
    HsmUnavailable,
    Malformed,
    ManagementUnavailable,
    SignatureInvalid,
    UkeyAbsent,
    Unsupported,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ApplicationName
from cipherfleet.contract.statements import ApplicationStatement, Right, Signed
from cipherfleet.terminal.applications import read_request, sign_in, sign_out
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.unit.terminal.platform import ACME, PIN, Kmc, Platform

BILLING = ApplicationName("billing")
REQUEST = make_request(new_key(), Identity(Role.APPLICATION, "billing", ACME))


def statement(platform: Platform, number: int = -1) -> ApplicationStatement:
    return platform.verify(platform.kmc.requests[number].statement, ApplicationStatement)


async def test_an_application_is_signed_in(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        profile = await sign_in(ukey, BILLING, (Right.DECRYPT, Right.ENCRYPT, Right.ENCRYPT), 30)
    assert (profile.consumer, profile.application) == (ACME, "billing")
    assert profile.rights == (Right.ENCRYPT, Right.DECRYPT)
    assert profile.endpoints == enrolled.management.endpoints
    assert profile.trust.encode() == enrolled.kmc.domain(ACME).pem
    assert abs(profile.not_after - time.time() - 30 * 86400) < 60
    leaf = check_chain(profile.chain.encode(), profile.trust.encode())
    assert identity_of(leaf) == Identity(Role.APPLICATION, "billing", ACME)
    key = load_pem_private_key(profile.key.encode(), None)
    spki = public_key_der(key.public_key())
    assert spki == public_key_der(leaf.public_key())
    signed = statement(enrolled)
    expected = ApplicationStatement(ACME, BILLING, hashlib.sha256(spki).digest(), profile.rights, profile.not_after, 1)
    assert signed == expected
    assert profile.key not in repr(profile)
    Credentials(profile.key.encode(), profile.chain.encode(), profile.trust.encode())


async def test_days_default_to_the_settings(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        profile = await sign_in(ukey, BILLING, tuple(Right))
    assert abs(profile.not_after - time.time() - 365 * 86400) < 60


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> x509.CertificateSigningRequest:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "whatever")])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm)


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
async def test_an_application_brings_its_own_request(enrolled: Platform, encoding: Encoding) -> None:
    key = new_key()
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        profile = await sign_in(ukey, BILLING, (Right.SIGN,), 1, csr(key).public_bytes(encoding))
    assert profile.key == ""
    assert statement(enrolled).public_key_sha256 == hashlib.sha256(public_key_der(key.public_key())).digest()


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()])
def test_keys_that_tls_can_use(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    request, spki = read_request(csr(key).public_bytes(Encoding.PEM))
    assert spki == public_key_der(key.public_key())
    assert request == csr(key).public_bytes(Encoding.DER) or request.startswith(b"\x30")


def _broken_signature() -> bytes:
    raw = bytearray(REQUEST)
    raw[-1] ^= 1
    return bytes(raw)


WRONG: list[tuple[bytes, type[CipherfleetError]]] = [
    (b"", Malformed),
    (b"nonsense", Malformed),
    (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", Malformed),
    (REQUEST[:-1], Malformed),
    (_broken_signature(), SignatureInvalid),
    (csr(ec.generate_private_key(ec.SECP224R1())).public_bytes(Encoding.DER), Unsupported),
    (csr(rsa.generate_private_key(65537, 1024)).public_bytes(Encoding.DER), Unsupported),  # noqa: S505 - that is the point
]


@pytest.mark.parametrize(("request_", "error"), WRONG)
async def test_a_request_that_is_none(enrolled: Platform, request_: bytes, error: type[CipherfleetError]) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        with pytest.raises(error):
            await sign_in(ukey, BILLING, (Right.SIGN,), 1, request_)
        assert enrolled.kmc.requests == []
        assert await ukey.memory.next_sequence() == 1, "no number was spent"


@pytest.mark.parametrize(
    ("name", "rights", "days"), [("Bad Name", (Right.SIGN,), 1), ("ok", (), 1), ("ok", (Right.SIGN,), 0), ("ok", (Right.SIGN,), 826)]
)
async def test_what_cannot_be_signed(enrolled: Platform, name: str, rights: tuple[Right, ...], days: int) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, pytest.raises(Malformed):
        await sign_in(ukey, ApplicationName(name), rights, days)
    assert enrolled.kmc.requests == []


async def test_sequences_grow_whatever_happens(enrolled: Platform) -> None:
    enrolled.kmc.fail["application"] = [None, HsmUnavailable("away"), None]
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
        with pytest.raises(HsmUnavailable):
            await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    assert [statement(enrolled, n).sequence for n in range(3)] == [1, 2, 3]


async def test_a_crash_between_number_and_use_loses_the_number(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: object) -> object:
        raise KeyboardInterrupt

    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, monkeypatch.context() as patched:
        patched.setattr("cipherfleet.terminal.applications.sign", crash)
        with pytest.raises(KeyboardInterrupt):
            await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    assert statement(enrolled).sequence == 2


async def test_without_management_nothing_is_signed(enrolled: Platform) -> None:
    enrolled.management.fail["domain"] = ManagementUnavailable("away")
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, pytest.raises(ManagementUnavailable):
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    assert enrolled.kmc.requests == []


async def test_without_the_ukey_nothing_is_signed(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        enrolled.ukey.rename(enrolled.ukey.with_name("pocket"))
        with pytest.raises(UkeyAbsent):
            await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    assert enrolled.kmc.requests == []


async def test_a_certificate_for_something_else_is_refused(enrolled: Platform) -> None:
    enrolled.kmc.domains[ACME] = enrolled.root.subordinate("domain acme")  # not the one on the Ukey
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, pytest.raises(CertificateInvalid):
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)


async def test_a_certificate_for_another_name_is_refused(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = enrolled.kmc.domain(ACME)
    certify = domain.certify
    monkeypatch.setattr(domain, "certify", lambda identity, key: certify(Identity(Role.APPLICATION, "payroll", ACME), key))
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, pytest.raises(CertificateInvalid):
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)


async def test_an_application_is_signed_out(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
        await sign_out(ukey, BILLING)
    signed = statement(enrolled)
    assert (signed.name, signed.rights, signed.revoked, signed.sequence) == (BILLING, (), True, 2)
    assert signed.not_after <= time.time()


async def test_the_ukey_remembers_what_it_signed(enrolled: Platform) -> None:
    enrolled.kmc.grow(2)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
        assert [r.since for r in enrolled.kmc.requests] == [2]
        await sign_out(ukey, BILLING)
        assert [r.since for r in enrolled.kmc.requests] == [2, 3]
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        assert ukey.memory.seen == enrolled.kmc.point()
        assert ukey.memory.seen.sequence == 4


async def both(ukey: DirectoryUkey, error: type[CipherfleetError]) -> None:
    before = ukey.memory.seen
    with pytest.raises(error):
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
    assert ukey.memory.seen == before
    with pytest.raises(error):
        await sign_out(ukey, BILLING)


async def test_a_statement_that_was_kept_back_is_found(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    async def kept_back(subject: str) -> None:
        enrolled.kmc.log.pop()

    monkeypatch.setattr(enrolled.kmc, "application_written", kept_back)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await both(ukey, EscrowRolledBack)


async def test_a_statement_under_another_number_is_found(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    async def renumbered(subject: str) -> None:
        enrolled.kmc.log.append(structs.replace(enrolled.kmc.log.pop(), subject="application/billing@99"))

    monkeypatch.setattr(enrolled.kmc, "application_written", renumbered)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await both(ukey, EscrowRolledBack)


async def test_a_reply_with_another_history_is_found(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    enrolled.kmc.grow(2)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
        enrolled.kmc.log[0] = structs.replace(enrolled.kmc.log[0], digest=b"x" * 32)
        await both(ukey, EscrowRolledBack)


async def test_a_reply_that_the_kmc_did_not_sign_is_found(enrolled: Platform) -> None:
    enrolled.kmc.signer = LocalSigner(new_key())
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await both(ukey, CheckpointForged)


async def test_a_heartbeat_may_see_more_meanwhile(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal uses the same Ukey at the same time, and is told of a later change first."""
    reply = type(enrolled.kmc).checkpoint

    async def overtaken(kmc: Kmc, *args: Any, **options: Any) -> Signed:
        checkpoint = await reply(kmc, *args, **options)
        if len(kmc.requests) == 1:
            kmc.grow()
            await other.memory.remember(kmc.point())
        return checkpoint

    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, DirectoryUkey.open(enrolled.ukey, PIN) as other:
        monkeypatch.setattr(Kmc, "checkpoint", overtaken)
        await sign_in(ukey, BILLING, (Right.SIGN,), 1)
        assert [statement(enrolled, n).sequence for n in range(2)] == [1, 2]
        assert ukey.memory.seen == enrolled.kmc.point()
