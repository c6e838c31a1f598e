"""A look at a whole escrow at once, as a VCM checks it bit by bit."""

from collections.abc import Iterable, Sequence

from cipherfleet.contract.errors import EscrowRolledBack
from cipherfleet.contract.escrow import EscrowRow, LogEntry, Seen, StatementEntry
from cipherfleet.contract.escrow_state import EscrowState
from cipherfleet.contract.ids import ConsumerId


def check_whole(
    consumer: ConsumerId,
    log: Sequence[LogEntry],
    rows: Iterable[EscrowRow],
    statements: Iterable[StatementEntry],
    checkpoint: Seen,
    seen: Seen | None = None,
) -> EscrowState:
    """That the log leads through ``seen`` to ``checkpoint``, and names these rows and statements and no others."""
    state = EscrowState(consumer, checkpoint.epoch)
    state.apply(log)
    if state.point != checkpoint:
        raise EscrowRolledBack("the log does not lead to its checkpoint")
    if seen is not None and not state.leads_through(seen):
        raise EscrowRolledBack("the log does not lead through what was seen before")
    numbers = {state.check_row(row) for row in rows}
    if len(numbers) != state.rows:
        raise EscrowRolledBack("rows are missing")
    names = set()
    for kept in statements:
        state.check_statement(kept)
        names.add(kept.name)
    if names != set(state.applications):
        raise EscrowRolledBack("statements are missing")
    return state
