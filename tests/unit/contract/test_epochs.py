"""Epochs and Ukeys in the escrow's log, as a VCM reads it."""

import pytest

from cipherfleet.contract.errors import EscrowRolledBack
from cipherfleet.contract.escrow import FIRST_EPOCH, LogEntry, Seen, epoch_of, epoch_subject, ukey_subject
from cipherfleet.contract.escrow_state import EscrowState
from cipherfleet.contract.ids import ConsumerId, UkeyId

ACME, SPARE = ConsumerId("acme"), UkeyId("ukey-0000000a")


def log(*subjects: str) -> list[LogEntry]:
    return [LogEntry(number, subject, bytes([number]) * 32) for number, subject in enumerate(subjects, 1)]


def test_the_log_goes_on_in_a_new_epoch() -> None:
    state = EscrowState(ACME, FIRST_EPOCH)
    state.apply(log("application/shop@1", ukey_subject(SPARE, 2)))
    old = state.point
    state.apply(log("application/shop@1", ukey_subject(SPARE, 2), epoch_subject(2, 5))[2:])
    assert (state.point.epoch, state.point.sequence) == (2, 3)
    assert state.leads_through(state.point)
    assert not state.leads_through(old)  # of the old epoch
    assert not state.leads_through(Seen(2, 2, state.point.head))


@pytest.mark.parametrize(
    "subjects",
    [
        (epoch_subject(1, 1),),
        (epoch_subject(2, 1), epoch_subject(2, 2)),
        (epoch_subject(3, 1), epoch_subject(2, 2)),
        (epoch_subject(2, 4), "application/shop@4"),
        (epoch_subject(2, 4), ukey_subject(SPARE, 3)),
        (ukey_subject(SPARE, 4), "application/shop@3"),
        (ukey_subject(SPARE, 4), epoch_subject(2, 4)),
        ("epoch/x@1",),
        ("epoch/2@x",),
        ("epoch/2",),
    ],
)
def test_what_is_out_of_order_is_refused(subjects: tuple[str, ...]) -> None:
    with pytest.raises(EscrowRolledBack):
        EscrowState(ACME, FIRST_EPOCH).apply(log(*subjects))


def test_which_epoch_an_entry_begins() -> None:
    assert [epoch_of(s) for s in ("epoch/7@1", "epoch/@1", "epoch/x@1", "key/7/1", "epoch/99999999999@1")] == [7, 0, 0, 0, 0]
