"""What the KMC keeps of consumers, certificates, tokens and VCMs: functions of an open transaction."""

from collections.abc import Iterable

import msgspec
from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from cipherfleet.channel.certificates import fingerprint
from cipherfleet.contract.errors import ConsumerRevoked, ConsumerUnknown, StateConflict
from cipherfleet.contract.escrow import FIRST_EPOCH, genesis
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, Serial, TokenId, UkeyId, VcmId
from cipherfleet.contract.kmc_api import ConsumerEntry
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.schema import authorities, certificates, consumers, statements, tokens, ukeys, usage_reports, vcms

PENDING, ENROLLED, REVOKED = "pending", "enrolled", "revoked"
ACTIVE = "active"


class Consumer(msgspec.Struct, frozen=True):
    """``ukey`` is the first one, ``ukeys`` those whose signatures count, by serial (SubjectPublicKeyInfo, DER)."""

    name: ConsumerId
    state: str
    ukey: bytes
    ukeys: dict[str, bytes]
    epoch: int
    sequence: int
    head: bytes
    row_bytes: int
    keys: int
    row_count: int
    aliases: int
    tags: int
    statement_sequence: int

    @property
    def ukey_keys(self) -> tuple[bytes, ...]:
        return tuple(self.ukeys.values())


class Token(msgspec.Struct, frozen=True):
    """``digest``: SHA-256 of the token, which the KMC does not keep."""

    id: TokenId
    consumer: ConsumerId
    digest: bytes
    mark: bytes


class Vcm(msgspec.Struct, frozen=True):
    """An authorised VCM, with its token."""

    id: VcmId
    consumer: ConsumerId
    machine: MachineId
    address: str
    card: CardId
    joined: bool
    released: bool
    loaded: bool
    serving: bool
    token: Token


# -- authorities and certificates --------------------------------------------------------------------------------------


def read_authorities(connection: Connection) -> dict[str, bytes]:
    return {row.name: row.certificate for row in connection.execute(select(authorities))}


def add_authority(connection: Connection, name: str, certificate: bytes) -> None:
    connection.execute(insert(authorities).values(name=name, certificate=certificate))


def remove_authority(connection: Connection, name: str) -> None:
    connection.execute(delete(authorities).where(authorities.c.name == name))


def add_certificate(connection: Connection, issued: Issued) -> None:
    connection.execute(
        insert(certificates).values(
            serial=issued.serial,
            role=issued.identity.role,
            consumer=issued.identity.consumer,
            id=issued.identity.id,
            spki_sha256=issued.public_key_sha256,
            not_after=issued.not_after,
            status="active",
            certificate=issued.pem,
        )
    )


def read_certificates(connection: Connection, now: float) -> list[tuple[Issued, bool]]:
    """All that may still be shown, each with whether it is revoked."""
    found = connection.execute(select(certificates).where(certificates.c.not_after > now - 3600))
    return [
        (
            Issued(row.serial, Identity(Role(row.role), row.id, row.consumer), row.spki_sha256, row.not_after, row.certificate),
            row.status == "revoked",
        )
        for row in found
    ]


def count_certificates(connection: Connection, identity: Identity, now: float) -> int:
    """How many of an identity are neither revoked nor expired."""
    valid = (certificates.c.status == "active") & (certificates.c.not_after > now)
    query = select(func.count()).select_from(certificates).where(_of(identity), valid)
    return connection.execute(query).scalar_one()


def revoke_other_keys(connection: Connection, issued: Issued) -> tuple[Serial, ...]:
    """What the identity of a certificate has for other keys; the serials it concerned."""
    others = (certificates.c.status == "active") & (certificates.c.spki_sha256 != issued.public_key_sha256)
    found = tuple(Serial(s) for s in connection.scalars(select(certificates.c.serial).where(_of(issued.identity), others)))
    revoke_serials(connection, found)
    return found


def _of(identity: Identity) -> ColumnElement[bool]:
    table = certificates.c
    return (table.role == identity.role) & (table.consumer == identity.consumer) & (table.id == identity.id)


def revoke_serials(connection: Connection, serials: Iterable[Serial]) -> None:
    connection.execute(update(certificates).where(certificates.c.serial.in_(list(serials))).values(status="revoked"))


def revoke_holders(
    connection: Connection, role: Role, consumer: ConsumerId | str = "", *, id_: str | None = None, keep: Serial | None = None
) -> tuple[Serial, ...]:
    """Revoke what a role of a consumer (one holder) has, but for ``keep``; the serials it concerned."""
    query = select(certificates.c.serial).where(
        certificates.c.role == role, certificates.c.consumer == consumer, certificates.c.status == "active"
    )
    if id_ is not None:
        query = query.where(certificates.c.id == id_)
    found = tuple(Serial(s) for s in connection.scalars(query) if s != keep)
    revoke_serials(connection, found)
    return found


def revoke_ukey(connection: Connection, consumer: ConsumerId) -> tuple[Serial, ...]:
    """The certificates of all Ukeys of a consumer; the serials it concerned."""
    return revoke_holders(connection, Role.UKEY, consumer) + revoke_holders(connection, Role.TERMINAL, consumer)


def revoke_one_ukey(connection: Connection, consumer: ConsumerId, id_: UkeyId) -> tuple[Serial, ...]:
    """Both certificates of one Ukey; the serials it concerned."""
    return revoke_holders(connection, Role.UKEY, consumer, id_=id_) + revoke_holders(connection, Role.TERMINAL, consumer, id_=id_)


def forget_vcm_certificates(connection: Connection, before: float) -> int:
    """Those that expired long ago; there is a new one every few minutes. How many there were."""
    gone = (certificates.c.role == Role.VCM) & (certificates.c.not_after < before)
    return connection.execute(delete(certificates).where(gone)).rowcount


def forget_usage_reports(connection: Connection) -> None:
    """The numbers of reports of VCMs that are gone."""
    connection.execute(delete(usage_reports).where(usage_reports.c.vcm.not_in(select(vcms.c.id))))


def revoke_cards(connection: Connection, machine: MachineId) -> tuple[Serial, ...]:
    """Every card that a machine had; the serials it concerned."""
    query = select(certificates.c.serial).where(
        certificates.c.role == Role.CARD,
        certificates.c.id.startswith(f"card-{machine}-", autoescape=True),
        certificates.c.status == "active",
    )
    found = tuple(Serial(s) for s in connection.scalars(query))
    revoke_serials(connection, found)
    return found


# -- consumers ---------------------------------------------------------------------------------------------------------


def find_consumer(connection: Connection, name: ConsumerId) -> Consumer | None:
    row = connection.execute(select(consumers).where(consumers.c.name == name)).first()
    if row is None:
        return None
    active = (ukeys.c.consumer == name) & (ukeys.c.state == ACTIVE)
    ids = {r.id: r.public_key for r in connection.execute(select(ukeys.c.id, ukeys.c.public_key).where(active).order_by(ukeys.c.added_at))}
    return Consumer(
        row.name,
        row.state,
        row.ukey,
        ids,
        row.epoch,
        row.sequence,
        row.head,
        row.row_bytes,
        row.keys,
        row.row_count,
        row.aliases,
        row.tags,
        row.statement_sequence,
    )


def get_consumer(connection: Connection, name: ConsumerId) -> Consumer:
    """An enrolled consumer. Raises ``ConsumerUnknown`` or ``ConsumerRevoked``."""
    found = find_consumer(connection, name)
    if found is not None and found.state == REVOKED:
        raise ConsumerRevoked(f"the Ukey of {name} was revoked by the operator")
    if found is None or found.state != ENROLLED:
        raise ConsumerUnknown(f"no consumer {name} is enrolled", "the operator enrols one with: cipherfleet consumer enroll")
    return found


def put_pending(connection: Connection, name: ConsumerId, ukey: bytes, *, at: float) -> None:
    """A consumer as it begins, whatever a pending one of that name was before."""
    remove_pending(connection, name)
    connection.execute(
        insert(consumers).values(
            name=name,
            state=PENDING,
            enrolled_at=at,
            ukey=ukey,
            epoch=FIRST_EPOCH,
            sequence=0,
            head=genesis(name, FIRST_EPOCH),
            row_bytes=0,
            keys=0,
            row_count=0,
            statement_sequence=0,
        )
    )
    add_ukey(connection, name, ukey, at=at, label="first")


def ukey_id(public_key: bytes) -> UkeyId:
    """What a Ukey is called, after its identity key."""
    return UkeyId(f"ukey-{fingerprint(public_key)[:8]}")


def add_ukey(connection: Connection, consumer: ConsumerId, public_key: bytes, *, at: float, label: str) -> None:
    values = {"consumer": consumer, "id": ukey_id(public_key), "public_key": public_key, "state": ACTIVE, "added_at": at}
    connection.execute(insert(ukeys).values(**values, label=label, revoked_by=""))


def confirm_consumer(connection: Connection, name: ConsumerId, *, at: float) -> None:
    connection.execute(update(consumers).where(consumers.c.name == name).values(state=ENROLLED, enrolled_at=at))


def find_revocable(connection: Connection, name: ConsumerId) -> Consumer:
    """A consumer that has, or had, a Ukey. Raises ``ConsumerUnknown``, or ``StateConflict`` for a pending one."""
    found = find_consumer(connection, name)
    if found is None:
        raise ConsumerUnknown(f"no consumer is called {name}", "see: cipherfleet consumer list")
    if found.state == PENDING:
        raise StateConflict(f"the enrolment of {name} was never finished", "it has no service; enrol it again")
    return found


def revoke_consumer(connection: Connection, name: ConsumerId) -> bool:
    """Its Ukey counts no more; whether it did. Raises as ``find_revocable`` does."""
    before = find_revocable(connection, name).state
    connection.execute(update(consumers).where(consumers.c.name == name).values(state=REVOKED))
    still = (ukeys.c.consumer == name) & (ukeys.c.state == ACTIVE)
    connection.execute(update(ukeys).where(still).values(state=REVOKED, revoked_by="operator"))
    return before != REVOKED


def remove_pending(connection: Connection, name: ConsumerId) -> None:
    if connection.execute(delete(consumers).where(consumers.c.name == name, consumers.c.state == PENDING)).rowcount:
        connection.execute(delete(ukeys).where(ukeys.c.consumer == name))


def list_consumers(connection: Connection) -> tuple[ConsumerEntry, ...]:
    signed_in = select(statements.c.consumer, func.count()).where(statements.c.revoked.is_(False)).group_by(statements.c.consumer)
    applications = {r[0]: r[1] for r in connection.execute(signed_in)}
    return tuple(
        ConsumerEntry(row.name, row.state, row.enrolled_at, row.keys, applications.get(row.name, 0))
        for row in connection.execute(select(consumers).order_by(consumers.c.name))
    )


# -- tokens and VCMs ---------------------------------------------------------------------------------------------------


def add_token(connection: Connection, token: Token) -> None:
    connection.execute(insert(tokens).values(id=token.id, consumer=token.consumer, digest=token.digest, mark=token.mark))


def count_tokens(connection: Connection, consumer: ConsumerId) -> int:
    return connection.execute(select(func.count()).select_from(tokens).where(tokens.c.consumer == consumer)).scalar_one()


def find_token(connection: Connection, id_: TokenId) -> Token | None:
    row = connection.execute(select(tokens).where(tokens.c.id == id_)).first()
    return None if row is None else Token(row.id, row.consumer, row.digest, row.mark)


def find_vcm(connection: Connection, id_: VcmId) -> Vcm | None:
    row = connection.execute(select(vcms).where(vcms.c.id == id_)).first()
    token = None if row is None else find_token(connection, row.token)
    if row is None or token is None:
        return None
    return Vcm(row.id, row.consumer, row.machine, row.address, row.card, row.joined, row.released, row.loaded, row.serving, token)


def vcm_of_token(connection: Connection, id_: TokenId) -> VcmId | None:
    return connection.execute(select(vcms.c.id).where(vcms.c.token == id_)).scalar_one_or_none()


def vcms_of(connection: Connection, consumer: ConsumerId) -> tuple[VcmId, ...]:
    return tuple(VcmId(v) for v in connection.scalars(select(vcms.c.id).where(vcms.c.consumer == consumer)))


def consumers_with_vcms(connection: Connection) -> tuple[ConsumerId, ...]:
    return tuple(ConsumerId(c) for c in connection.scalars(select(vcms.c.consumer).distinct()))


def add_vcm(connection: Connection, id_: VcmId, consumer: ConsumerId, machine: MachineId, token: TokenId, address: str) -> None:
    connection.execute(
        insert(vcms).values(
            id=id_,
            consumer=consumer,
            machine=machine,
            token=token,
            address=address,
            card="",
            joined=False,
            released=False,
            loaded=False,
            serving=False,
        )
    )


def change_vcm(connection: Connection, id_: VcmId, **values: object) -> None:
    connection.execute(update(vcms).where(vcms.c.id == id_).values(**values))


def remove_vcm(connection: Connection, id_: VcmId) -> bool:
    """The authorisation and its token; whether they were there."""
    token = connection.execute(select(vcms.c.token).where(vcms.c.id == id_)).scalar_one_or_none()
    if token is None:
        return False
    connection.execute(delete(vcms).where(vcms.c.id == id_))
    connection.execute(delete(tokens).where(tokens.c.id == token))
    return True


def remove_token(connection: Connection, id_: TokenId) -> bool:
    """An unbound token; whether there was one."""
    return connection.execute(delete(tokens).where(tokens.c.id == id_)).rowcount > 0


def remove_service(connection: Connection, consumer: ConsumerId) -> int:
    """All VCMs and tokens of a consumer; how many tokens there were."""
    connection.execute(delete(vcms).where(vcms.c.consumer == consumer))
    return connection.execute(delete(tokens).where(tokens.c.consumer == consumer)).rowcount
