"""What of the inventory counts no more after it was restored. Functions of an open transaction."""

from sqlalchemy import Connection, delete, update

from cipherfleet.contract.machine_api import VcmState
from cipherfleet.management import outbox
from cipherfleet.management.schema import domains, ports, tokens, vcms

RESTORED = "service-off: the platform was restored from a backup"


def strip(connection: Connection) -> None:
    """What of a snapshot has no business in a backup: tokens of VCMs stand here in the clear."""
    connection.execute(delete(tokens))


def void_past(connection: Connection, *, at: float) -> int:
    """After a restore: no VCM of before is there, and nobody wants service until its Ukey is in. How many VCMs that concerned."""
    strip(connection)
    outbox.renew(connection)  # numbers that were given since the backup are given again
    connection.execute(delete(ports))
    lived = vcms.c.state != VcmState.DELETED
    gone = {"state": VcmState.DELETED, "changed_at": at, "token_id": None, "error": RESTORED}
    connection.execute(update(domains).values(wanted=False))
    return connection.execute(update(vcms).where(lived).values(**gone)).rowcount
