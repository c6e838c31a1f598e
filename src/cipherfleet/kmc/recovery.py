"""What a backup says of the KMC's database, and what of the past counts no more after it was restored. Functions of an open transaction."""

from sqlalchemy import Connection, delete, select, update

from cipherfleet.contract.identities import Role
from cipherfleet.contract.recovery import ConsumerPoint
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.schema import certificates, consumers, management_outbox, tokens, vcms

OPERATOR = "cipherfleet:operator/-/operator"
VOID = (Role.OPERATOR, Role.KMC, Role.MANAGEMENT, Role.MACHINE, Role.CARD, Role.VCM)
"""Whose certificates end with a restore: the keys of these are in memory, or were on the machine that is gone."""


def describe(connection: Connection) -> tuple[ConsumerPoint, ...]:
    """Up to where each consumer's escrow goes."""
    points = {
        row.name: row for row in connection.execute(select(consumers.c.name, consumers.c.epoch, consumers.c.sequence, consumers.c.head))
    }
    return tuple(
        ConsumerPoint(e.name, e.state, points[e.name].epoch, points[e.name].sequence, points[e.name].head, e.keys, e.applications)
        for e in store.list_consumers(connection)
    )


def strip(connection: Connection) -> None:
    """What of a snapshot has no business in a backup: authorisations of VCMs, whose tokens somebody may still hold."""
    connection.execute(delete(vcms))
    connection.execute(delete(tokens))


def void_past(connection: Connection, *, at: float, made_at: float) -> int:
    """After a restore: no token, no VCM, no card, no certificate of the platform from before counts. How many certificates ended.

    Ukeys, terminals and applications keep theirs: the keys are not the platform's.
    """
    strip(connection)
    connection.execute(delete(management_outbox))  # the management platform may be further on, or back as well
    active = (certificates.c.status == "active") & certificates.c.role.in_(VOID)
    ended = connection.execute(update(certificates).where(active).values(status="revoked")).rowcount
    names = ["", *connection.scalars(select(consumers.c.name).order_by(consumers.c.name))]
    for name in names:
        audit.append(connection, name, at=at, actor=OPERATOR, event="restored", subject=f"from a backup of {made_at:.0f} (unix seconds)")
    return ended
