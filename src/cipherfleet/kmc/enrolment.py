"""Consumers, cards and platform processes come into the cloud: their first certificates."""

import asyncio
import contextlib
import re
from functools import partial

from sqlalchemy import Connection

from cipherfleet.channel.certificates import public_key_der
from cipherfleet.contract.errors import ConsumerRevoked, ConsumerUnknown, Exists, HsmUnavailable, Malformed, NotPermitted, StateConflict
from cipherfleet.contract.escrow import FIRST_EPOCH, Seen, genesis
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, Serial
from cipherfleet.contract.kmc_api import CardReply, CardRequest, ConsumerList, EnrolReply, EnrolRequest
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.certification import UKEY_DAYS, domain_label
from cipherfleet.kmc.escrow import Escrow
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.requests import subject_key

DAY_S = 86400
HPKE_KEY_BYTES = 1184 + 32
OPERATOR = Identity(Role.OPERATOR, "operator")
_PLATFORM_IDS = {Role.OPERATOR: r"\Aoperator\Z", Role.MANAGEMENT: r"\Amanagement\Z", Role.MACHINE: r"\Am[0-9]{1,4}\Z"}


class Enrolment:
    """One enrolment at a time: they make CAs."""

    def __init__(self, center: Center, escrow: Escrow) -> None:
        self._center, self._escrow = center, escrow
        self._one = asyncio.Lock()

    # -- consumers -----------------------------------------------------------------------------------------------------

    async def enrol(self, request: EnrolRequest) -> EnrolReply:
        """A pending consumer; one that was pending before is replaced. The HSM share is in the reply and nowhere else.

        Raises ``Exists`` for an enrolled one, ``ConsumerRevoked`` for a revoked one, or what is wrong with the requests.
        """
        async with self._one:
            center, consumer = self._center, request.consumer
            identity_key, channel_key = subject_key(request.identity_csr, Role.UKEY), subject_key(request.channel_csr, Role.TERMINAL)
            ukey = public_key_der(identity_key)
            if ukey == public_key_der(channel_key):
                raise Malformed("the Ukey's identity and its channel need a key each")
            await center.database.read(partial(_check_not_enrolled, consumer=consumer))
            domain = await self._domain(consumer)
            until, ukey_id = center.wall_clock() + UKEY_DAYS * DAY_S, store.ukey_id(ukey)
            identity = await center.certification.issue(Identity(Role.UKEY, ukey_id, consumer), identity_key, not_after=until)
            channel = await center.certification.issue(Identity(Role.TERMINAL, ukey_id, consumer), channel_key, not_after=until)
            ciphertext_cmk = await center.hsm.generate_wrapped(center.root_key)
            checkpoint = await self._escrow.checkpoint(consumer, Seen(FIRST_EPOCH, 0, genesis(consumer, FIRST_EPOCH)))
            at = center.wall_clock()

            def commit(connection: Connection) -> tuple[Serial, ...]:
                _check_not_enrolled(connection, consumer)
                superseded = store.revoke_ukey(connection, consumer)
                store.put_pending(connection, consumer, ukey, at=at)
                for issued in (identity, channel):
                    store.add_certificate(connection, issued)
                audit.append(connection, consumer, at=at, actor=OPERATOR.uri, event="enrolled", subject=ukey_id, outcome="pending")
                return superseded

            def committed(superseded: tuple[Serial, ...]) -> None:
                center.recorded(identity)
                center.recorded(channel, superseded)

            await center.database.write(commit, committed)
            chain = center.certification.chain
            root = center.certification.root_pem
            return EnrolReply(chain(identity), chain(channel), root, domain, center.signer.public_key, ciphertext_cmk, checkpoint)

    async def confirm(self, consumer: ConsumerId, ukey_id: str) -> None:
        """The Ukey is written: the consumer counts. Idempotent.

        Raises ``ConsumerUnknown``, or ``Exists`` when the name is another Ukey's.
        """
        at = self._center.wall_clock()

        def commit(connection: Connection) -> None:
            found = store.find_consumer(connection, consumer)
            if found is None:
                raise ConsumerUnknown(f"no consumer is called {consumer}")
            if store.ukey_id(found.ukey) != ukey_id:
                raise Exists(f"another enrolment of {consumer} took the place of this one")
            if found.state == store.PENDING:
                store.confirm_consumer(connection, consumer, at=at)
                audit.append(connection, consumer, at=at, actor=OPERATOR.uri, event="enrolled", subject=consumer)

        await self._center.database.write(commit)

    async def remove(self, consumer: ConsumerId) -> None:
        """An enrolment that was not finished. Idempotent. Raises ``StateConflict`` for one that is not pending."""
        async with self._one:
            at, name = self._center.wall_clock(), domain_label(consumer)

            def commit(connection: Connection) -> tuple[Serial, ...]:
                found = store.find_consumer(connection, consumer)
                if found is not None and found.state != store.PENDING:
                    raise StateConflict(f"consumer {consumer} is {found.state}, only a pending enrolment can be taken back")
                store.remove_pending(connection, consumer)
                store.remove_authority(connection, name)
                if found is not None:
                    audit.append(connection, consumer, at=at, actor=OPERATOR.uri, event="enrolment-removed", subject=consumer)
                return store.revoke_ukey(connection, consumer)

            await self._center.database.write(commit, self._center.revoked)
            self._center.certification.drop(name)
            with contextlib.suppress(HsmUnavailable):  # a key that stays behind is taken by the next enrolment of that name
                handle = await self._center.hsm.find(name)
                if handle is not None:
                    await self._center.hsm.destroy(handle)

    async def list_consumers(self) -> ConsumerList:
        return ConsumerList(await self._center.database.read(store.list_consumers))

    async def _domain(self, consumer: ConsumerId) -> bytes:
        """The consumer's own CA, made at its first enrolment."""
        name, center = domain_label(consumer), self._center
        known = (await center.database.read(store.read_authorities)).get(name)
        if known is None:
            known = await center.certification.make(name)
            await center.database.write(partial(store.add_authority, name=name, certificate=known))
        await center.certification.add(name, known)
        return known

    # -- cards and platform processes ----------------------------------------------------------------------------------

    async def card(self, request: CardRequest, machine: Peer) -> CardReply:
        """A freshly started card; older ones of its machine are revoked. Raises ``NotPermitted`` or ``Malformed``."""
        if not request.card.startswith(f"card-{machine.identity.id}-"):
            raise NotPermitted(f"{request.card} is not a card of {machine.identity.id}")
        if len(request.hpke_public_key) != HPKE_KEY_BYTES:
            raise Malformed(f"a card's HPKE key has {HPKE_KEY_BYTES} bytes")
        center, key, at = self._center, subject_key(request.csr, Role.CARD), self._center.wall_clock()
        until = at + center.settings.process_certificate_days * DAY_S
        issued = await center.certification.issue(
            Identity(Role.CARD, request.card), key, not_after=until, hpke_public_key=request.hpke_public_key
        )

        def commit(connection: Connection) -> tuple[Serial, ...]:
            older = store.revoke_cards(connection, MachineId(machine.identity.id))
            store.add_certificate(connection, issued)
            audit.append(connection, "", at=at, actor=machine.identity.uri, event="card-certified", subject=request.card)
            return older

        await center.database.write(commit, partial(center.recorded, issued))
        return CardReply(center.certification.chain(issued), center.signer.public_key)

    async def platform(self, role: str, id_: str, request: CertificateRequest, *, actor: str) -> Chain:
        """A certificate for a process of the platform, which ends those it had before, or for the operator.

        Raises ``NotPermitted``.
        """
        pattern = _PLATFORM_IDS.get(Role(role)) if role in set(Role) else None
        if pattern is None or re.match(pattern, id_) is None:
            raise NotPermitted(f"the operator does not certify {role[:32]} {id_[:32]}")
        identity = Identity(Role(role), id_)
        issued = await self.issue_platform(identity, request, actor=actor, alone=identity.role is not Role.OPERATOR)
        return self._center.certification.chain(issued)

    async def issue_platform(self, identity: Identity, request: CertificateRequest, *, actor: str, alone: bool = False) -> Issued:
        """``alone``: certificates of this identity for other keys are revoked."""
        center, at = self._center, self._center.wall_clock()
        until = at + center.settings.process_certificate_days * DAY_S
        key = subject_key(request.csr, identity.role)
        issued = await center.certification.issue(identity, key, not_after=until, addresses=request.addresses)

        def commit(connection: Connection) -> tuple[Serial, ...]:
            older = store.revoke_other_keys(connection, issued) if alone else ()
            store.add_certificate(connection, issued)
            audit.append(connection, "", at=at, actor=actor, event="certificate-issued", subject=identity.uri)
            return older

        await center.database.write(commit, partial(center.recorded, issued))
        return issued


def _check_not_enrolled(connection: Connection, consumer: ConsumerId) -> None:
    found = store.find_consumer(connection, consumer)
    if found is not None and found.state == store.REVOKED:
        raise ConsumerRevoked(f"consumer {consumer} was revoked", "enrol the new Ukey under another name")
    if found is not None and found.state == store.ENROLLED:
        raise Exists(f"consumer {consumer} is enrolled already")
