"""Signing an application in and out: only the Ukey can, the KMC merely certifies what the Ukey signed."""

import hashlib
import time
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from msgspec import structs

from cipherfleet.channel.certificates import check_chain, identity_of, key_to_pem, make_request, new_key, public_key_der
from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import CertificateInvalid, EscrowRolledBack, Malformed, SignatureInvalid, StatementReplayed, Unsupported
from cipherfleet.contract.escrow import StatementEntry, statement_digest
from cipherfleet.contract.grants import Grant, check_grants
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ApplicationName, is_slug
from cipherfleet.contract.kmc_api import ApplicationReply, ApplicationRequest
from cipherfleet.contract.management_api import DomainInfo
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import ApplicationStatement, Right
from cipherfleet.terminal.callers import kmc_caller, management_caller
from cipherfleet.terminal.catch_up import FOLLOWED, catch_up
from cipherfleet.terminal.checkpoint import advance, check_recorded
from cipherfleet.terminal.ukey import Ukey

MAX_DAYS = 825
ATTEMPTS = 3


async def sign_in(
    ukey: Ukey,
    name: ApplicationName,
    rights: Sequence[Right],
    days: int | None = None,
    csr: bytes | None = None,
    settings: Settings | None = None,
    *,
    grants: Sequence[Grant] = (),
) -> Profile:
    """The profile of the application ``name``, certified for ``days`` with ``rights`` (for every key) and ``grants`` (for some).

    ``csr`` (PKCS#10, PEM or DER) leaves the key with the application; otherwise one is made here and goes into the profile.
    Raises ``Malformed``, ``SignatureInvalid``, ``Unsupported``, ``UkeyAbsent``, ``EscrowRolledBack``, ``CheckpointForged``, or
    what KMC or management answered.
    """
    days = (settings or Settings()).application_days if days is None else days
    if not is_slug(name):
        raise Malformed("an application's name has 1 to 32 of a-z, 0-9 and dash")
    check_grants(grants)
    if not rights and not grants:
        raise Malformed("an application without any right can do nothing", f"rights are: {', '.join(Right)}")
    if not 1 <= days <= MAX_DAYS:
        raise Malformed(f"an application's certificate lasts 1 to {MAX_DAYS} days")
    consumer, granted = ukey.record.consumer, tuple(right for right in Right if right in rights)
    key_pem = b""
    if csr is None:
        key = new_key()
        key_pem = key_to_pem(key)
        csr = make_request(key, Identity(Role.APPLICATION, name, consumer))
    request, public_key = read_request(csr)
    async with management_caller(ukey) as management:  # first: without endpoints the certificate would be of no use
        domain = await management.call("GET", "/v1/domain", reply=DomainInfo)
    not_after = int(time.time()) + days * 86400
    named = ApplicationStatement(consumer, name, hashlib.sha256(public_key).digest(), granted, not_after, 0, grants=tuple(grants))
    chain = await _submit(ukey, named, request)
    leaf = check_chain(chain.chain, ukey.record.domain.encode())
    if identity_of(leaf) != Identity(Role.APPLICATION, name, consumer) or public_key_der(leaf.public_key()) != public_key:
        raise CertificateInvalid("the KMC certified something else than was asked for")
    return Profile(
        consumer=consumer,
        application=name,
        endpoints=domain.endpoints,
        trust=ukey.record.domain,  # from the Ukey, not from the answer
        chain=chain.chain.decode(),
        key=key_pem.decode(),
        rights=granted,
        grants=tuple(grants),
        not_after=not_after,
        root=ukey.record.root,
        kmc_signing_key=ukey.record.kmc_signing_key,
    )


async def sign_in_anew(ukey: Ukey, profile: Profile, rights: Sequence[Right], days: int, grants: Sequence[Grant]) -> Profile:
    """``sign_in`` with the key in ``profile``: other rights and grants in the place of those before. Raises as it does."""
    if profile.consumer != ukey.record.consumer:
        raise Malformed("the profile is another consumer's")
    try:
        key = load_pem_private_key(profile.key.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise Malformed("the profile's key cannot be read") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Malformed("the profile's key is of another kind than those that are made here")
    name = profile.application
    csr = make_request(key, Identity(Role.APPLICATION, name, profile.consumer))
    made = await sign_in(ukey, name, rights, days, csr, grants=grants)
    return structs.replace(made, key=profile.key)


async def sign_out(ukey: Ukey, name: ApplicationName) -> None:
    """Take all rights from the application ``name``; its certificate is revoked, and the escrow holds the consumer's word on it.

    Raises ``Malformed``, ``UkeyAbsent``, ``EscrowRolledBack``, ``CheckpointForged``, or what the KMC answered.
    """
    if not is_slug(name):
        raise Malformed("an application's name has 1 to 32 of a-z, 0-9 and dash")
    await _submit(ukey, ApplicationStatement(ukey.record.consumer, name, bytes(32), (), int(time.time()), 0, revoked=True), b"")


async def _submit(ukey: Ukey, statement: ApplicationStatement, csr: bytes) -> Chain:
    """Number, sign and send a statement; the answer's chain, once the escrow has shown that it wrote the statement down.

    The Ukey remembers that point of the escrow: a log without the statement is a rollback from then on.
    """
    memory, key = ukey.memory, ukey.record.kmc_signing_key
    for attempt in range(1, ATTEMPTS + 1):
        async with kmc_caller(ukey) as kmc:
            await catch_up(ukey, kmc)
            numbered = structs.replace(statement, sequence=await memory.next_sequence())  # a number is lost rather than given twice
            signed = await sign(numbered, ukey.signer)
            seen = memory.seen
            try:
                reply = await kmc.call("POST", "/v1/applications", ApplicationRequest(signed, csr, seen.sequence), reply=ApplicationReply)
            except StatementReplayed:  # another Ukey of the consumer took the number
                if attempt == ATTEMPTS:
                    raise
                continue
            point = advance(statement.consumer, seen, reply.checkpoint, reply.log, key)
            entry = StatementEntry(statement.name, signed, numbered.sequence)
            check_recorded(reply.log, seen, point, entry.subject, statement_digest(signed))
            if any(other.sequence > seen.sequence and other.subject.startswith(FOLLOWED) for other in reply.log):
                await catch_up(ukey, kmc)  # another Ukey of the consumer said something meanwhile
        try:
            await memory.remember(point)
        except EscrowRolledBack:
            if attempt == ATTEMPTS or memory.seen.sequence <= point.sequence:
                raise
            continue  # a heartbeat brought a later point meanwhile, which may not lead through this one: sign anew from there
        return reply.chain
    raise RuntimeError("the last attempt returns or raises")


def read_request(csr: bytes) -> tuple[bytes, bytes]:
    """A certificate request as DER, and its public key (SubjectPublicKeyInfo DER).

    Raises ``Malformed``, ``SignatureInvalid`` when its owner does not hold the key, ``Unsupported`` for a key TLS cannot use.
    """
    try:
        pem = csr.lstrip().startswith(b"-----BEGIN")
        request = x509.load_pem_x509_csr(csr) if pem else x509.load_der_x509_csr(csr)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise Malformed("the certificate request cannot be read", "give PKCS#10 as PEM or DER") from exc
    if not valid:
        raise SignatureInvalid("the certificate request is not signed by its own key")
    if not (
        isinstance(key, ed25519.Ed25519PublicKey)
        or (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1)))
        or (isinstance(key, rsa.RSAPublicKey) and key.key_size in (3072, 4096))
    ):
        raise Unsupported(
            "the certificate request's key is of an unsuitable kind or size", "use EC P-256 or P-384, Ed25519, RSA-3072 or RSA-4096"
        )
    return request.public_bytes(Encoding.DER), public_key_der(key)
