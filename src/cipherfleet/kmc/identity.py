"""Who the consumer is and which VCM may be its: challenge, token, authorisation, the VCM's certificate (steps b and e)."""

import hashlib
import hmac
import ipaddress
import secrets
from functools import partial

import msgspec
from sqlalchemy import Connection

from cipherfleet.channel import signing
from cipherfleet.contract.errors import (
    CardUntrusted,
    CipherfleetError,
    Exists,
    ForeignConsumer,
    LimitReached,
    Malformed,
    NotPermitted,
    StatementForged,
    TokenStale,
    VcmUnknown,
)
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import CardId, ConsumerId, Serial, VcmId, token_id_of
from cipherfleet.contract.kmc_api import Challenge, IdentityReply, VcmAuthorisation, VcmCertificateRequest
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.statements import IdentityRequest, Purpose, Signed
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.challenges import Challenges
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.requests import SubjectKey, subject_key
from cipherfleet.kmc.service import Service

TOKEN_BYTES = 32
MAX_TOKENS = 256
"""Tokens of one consumer, used or not."""
MAX_CERTIFICATES = 16
"""Certificates of one VCM that are valid at the same time; two are usual."""
MARK_PREFIX = b"cipherfleet download mark v1"


def token_digest(token: bytes) -> bytes:
    return hashlib.sha256(b"cipherfleet token v1" + token).digest()


def mark_of(token: bytes) -> bytes:
    """The mark "CMK may be downloaded" that belongs to a token."""
    return hashlib.sha256(MARK_PREFIX + token).digest()


class IdentityDesk:
    """Step b, deletion step 2, and step e."""

    def __init__(self, center: Center, service: Service) -> None:
        self._center, self._service = center, service
        self._challenges = Challenges(center.settings.challenge_s)

    async def challenge(self, consumer: ConsumerId) -> Challenge:
        """Raises ``ConsumerUnknown``, ``ConsumerRevoked``, ``LimitReached``, or ``ServiceOff`` while a revocation waits for the disk."""
        await self._center.database.read(partial(store.get_consumer, name=consumer))
        self._service.revoke.check_settled(consumer)
        return Challenge(self._challenges.new(consumer), self._center.settings.challenge_s)

    async def verify(self, signed: Signed, *, actor: str) -> IdentityReply:
        """step b: that the Ukey answered the challenge.

        For a build a new ``user_vcm_token``; for a deletion everything of the VCM is revoked. Raises ``StatementForged``,
        ``ConsumerUnknown``, ``ConsumerRevoked``, ``ChallengeUnknown``, ``ChallengeReplayed``, ``ForeignConsumer`` or ``Malformed``.
        """
        request = _claimed(signed)
        consumer = await self._center.database.read(partial(store.get_consumer, name=request.consumer))
        self._service.revoke.check_settled(consumer.name)
        try:
            signing.verify(signed, IdentityRequest, consumer.ukey_keys)
            if (request.purpose is Purpose.BUILD_VCM) != (request.vcm is None):
                raise Malformed("to build names no VCM, to delete names one")
            self._challenges.redeem(request.nonce, consumer.name)
            if request.vcm is not None:
                await self._service.revoke.vcm(request.vcm, request.purpose, actor=f"Ukey of {consumer.name}", consumer=consumer.name)
                await self._center.audit(consumer.name, f"Ukey of {consumer.name}", "identity-verified", f"{request.purpose} {request.vcm}")
                return IdentityReply(consumer.name, request.purpose, request.vcm)
            return await self._new_token(consumer.name, request)
        except CipherfleetError as exc:
            await self._center.audit_refusal(consumer.name, actor, "identity-verified", request.purpose, exc.code)
            raise

    async def _new_token(self, consumer: ConsumerId, request: IdentityRequest) -> IdentityReply:
        """Creation step 2."""
        secret = secrets.token_bytes(TOKEN_BYTES)
        token = store.Token(token_id_of(request.nonce), consumer, token_digest(secret), mark_of(secret))
        at = self._center.wall_clock()

        def commit(connection: Connection) -> None:
            store.get_consumer(connection, consumer)
            self._service.revoke.check_token(token.id)
            if store.count_tokens(connection, consumer) >= MAX_TOKENS:
                raise LimitReached(f"{consumer} has {MAX_TOKENS} VCMs and tokens, no more")
            store.add_token(connection, token)
            actor = f"Ukey of {consumer}"
            audit.append(connection, consumer, at=at, actor=actor, event="identity-verified", subject=request.purpose)
            audit.append(connection, consumer, at=at, actor="kmc", event="token-created", subject=token.id)

        await self._center.database.write(commit)
        return IdentityReply(consumer, request.purpose, None, token.id, secret, token.mark)

    async def authorise(self, id_: VcmId, order: VcmAuthorisation, *, actor: str) -> None:
        """Creation step 4: this token, this VCM, this machine, this address. Idempotent for the same.

        Raises ``TokenStale``, ``ForeignConsumer``, ``Exists`` or ``Malformed``.
        """
        address, at = _ip_of(order.address), self._center.wall_clock()
        self._service.revoke.check_settled(order.consumer)

        def commit(connection: Connection) -> None:
            store.get_consumer(connection, order.consumer)
            token = store.find_token(connection, order.token_id)
            if token is None:
                raise TokenStale("this token is revoked or was never given")
            if token.consumer != order.consumer:
                raise ForeignConsumer("this token is another consumer's")
            here, bound = store.find_vcm(connection, id_), store.vcm_of_token(connection, token.id)
            if here is None and bound is None:
                store.add_vcm(connection, id_, order.consumer, order.machine, token.id, address)
                subject = f"{id_} on {order.machine} at {address}"
                audit.append(connection, order.consumer, at=at, actor=actor, event="vcm-authorised", subject=subject)
            elif here is None or bound != id_ or (here.machine, here.address) != (order.machine, address):
                raise Exists(f"{id_} or its token is bound already")

        await self._center.database.write(commit)

    async def certify(self, id_: VcmId, request: VcmCertificateRequest, machine: Peer) -> Chain:
        """step e: the VCM authenticates itself by its token, from the machine it was placed on, until it has joined.

        Raises ``TokenStale``, ``NotPermitted``, ``CardUntrusted`` or what is wrong with the request.
        """
        found = await self._center.database.read(partial(store.find_vcm, id_=id_))
        try:
            vcm = self._check_token(found, request, machine)
            self._service.revoke.check_settled(vcm.consumer)
            self._check_card(request.card, machine)
            key = subject_key(request.csr, Role.VCM)
        except CipherfleetError as exc:
            await self._center.audit_refusal(found.consumer if found else "", machine.identity.uri, "vcm-certified", id_, exc.code)
            raise
        issued = await self._issue(vcm, key)
        at = self._center.wall_clock()

        def commit(connection: Connection) -> tuple[Serial, ...]:
            self._check_token(store.find_vcm(connection, id_), request, machine)
            superseded = store.revoke_holders(connection, Role.VCM, vcm.consumer, id_=id_)
            store.change_vcm(connection, id_, card=request.card)
            store.add_certificate(connection, issued)
            subject = f"{id_} with {request.card}"
            audit.append(connection, vcm.consumer, at=at, actor=machine.identity.uri, event="vcm-certified", subject=subject)
            return superseded

        await self._center.database.write(commit, partial(self._center.recorded, issued))
        return self._center.certification.chain(issued)

    async def renew(self, request: CertificateRequest, peer: Peer) -> Chain:
        """A VCM's next certificate, for as long as it is authorised.

        Raises ``VcmUnknown``, ``LimitReached`` or what is wrong with the request.
        """
        id_, consumer = VcmId(peer.identity.id), peer.identity.consumer
        now = self._center.wall_clock()

        def check(connection: Connection) -> store.Vcm:
            vcm = store.find_vcm(connection, id_)
            if vcm is None or vcm.consumer != consumer:
                raise VcmUnknown(f"{id_} is not authorised")
            if store.count_certificates(connection, peer.identity, now) >= MAX_CERTIFICATES:
                raise LimitReached(f"{id_} has {MAX_CERTIFICATES} certificates, no more")
            return vcm

        issued = await self._issue(await self._center.database.read(check), subject_key(request.csr, Role.VCM))

        def commit(connection: Connection) -> None:
            check(connection)  # again: others may have renewed meanwhile
            store.add_certificate(connection, issued)

        await self._center.database.write(commit, lambda _: self._center.recorded(issued))
        self._service.vcm_renewed(issued)
        return self._center.certification.chain(issued)

    async def _issue(self, vcm: store.Vcm, key: SubjectKey) -> Issued:
        until = self._center.wall_clock() + self._center.settings.vcm_certificate_s
        identity = Identity(Role.VCM, vcm.id, vcm.consumer)
        return await self._center.certification.issue(identity, key, not_after=until, addresses=[vcm.address])

    def _check_token(self, vcm: store.Vcm | None, request: VcmCertificateRequest, machine: Peer) -> store.Vcm:
        if vcm is not None and vcm.machine != machine.identity.id:
            raise NotPermitted(f"{vcm.id} was placed on another machine")
        # Compared even when there is nothing to compare with, so that the time tells nothing.
        expected = vcm.token.digest if vcm is not None else bytes(32)
        if not hmac.compare_digest(token_digest(request.token), expected) or vcm is None or vcm.joined:
            raise TokenStale("this token is used up, revoked, or another VCM's")
        return vcm

    def _check_card(self, card: CardId, machine: Peer) -> None:
        ours = card.startswith(f"card-{machine.identity.id}-")
        if not ours or not self._center.registry.active(Identity(Role.CARD, card)):
            raise CardUntrusted(f"{card} is not in service on {machine.identity.id}")


def _claimed(signed: Signed) -> IdentityRequest:
    """What an envelope says, before its signature is checked: only to find the key to check it with."""
    try:
        if signed.kind != IdentityRequest.KIND or len(signed.payload) > signing.MAX_STATEMENT_BYTES:
            raise StatementForged("this is not an identity request")
        return msgspec.json.decode(signed.payload, type=IdentityRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise Malformed("the identity request cannot be read") from exc


def _ip_of(address: str) -> str:
    """The IP address of ``host:port``. Raises ``Malformed``."""
    try:
        return str(ipaddress.ip_address(address.rpartition(":")[0] or address))
    except ValueError as exc:
        raise Malformed("a VCM's address is IP:port") from exc
