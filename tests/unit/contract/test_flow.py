"""The service flow: the ciphertext CMK is released for a matching mark, once, and in order."""

import pytest

from cipherfleet.contract.errors import MarkMismatch, OutOfOrder
from cipherfleet.contract.flow import FlowStep, Mark, ServiceFlow
from cipherfleet.contract.ids import VcmId

VCM, OTHER = VcmId("vcm-00000000000a"), VcmId("vcm-00000000000b")


def flow_at_e() -> ServiceFlow:
    flow = ServiceFlow()
    flow.reach(FlowStep.REQUESTED)
    flow.reach(FlowStep.IDENTIFIED)
    flow.mark(Mark(VCM, b"m" * 32))
    flow.reach(FlowStep.PLACED)
    flow.reach(FlowStep.AUTHORISED)
    return flow


def test_the_whole_flow() -> None:
    flow = flow_at_e()
    flow.release(Mark(VCM, b"m" * 32))
    for step in (FlowStep.KEYS_LOADED, FlowStep.SERVING, FlowStep.PLANNED):
        flow.reach(step)
    assert flow.reached == list(FlowStep)
    assert flow.serving


@pytest.mark.parametrize("signal", [Mark(VCM, b"x" * 32), Mark(OTHER, b"m" * 32), Mark(VCM, b""), Mark(VCM, b"m" * 31)])
def test_a_signal_that_does_not_match_releases_nothing(signal: Mark) -> None:
    flow = flow_at_e()
    with pytest.raises(MarkMismatch):
        flow.release(signal)
    assert FlowStep.RELEASED not in flow.reached


def test_a_mark_is_used_once() -> None:
    flow = flow_at_e()
    with pytest.raises(MarkMismatch):
        flow.release(Mark(VCM, b"x" * 32))
    with pytest.raises(MarkMismatch):
        flow.release(Mark(VCM, b"m" * 32))


def test_without_a_mark_nothing_is_released() -> None:
    with pytest.raises(MarkMismatch):
        ServiceFlow().release(Mark(VCM, b"m" * 32))


@pytest.mark.parametrize("early", [s for s in FlowStep if s is not FlowStep.REQUESTED])
def test_no_step_comes_early(early: FlowStep) -> None:
    with pytest.raises(OutOfOrder):
        ServiceFlow().reach(early)


def test_no_step_comes_twice() -> None:
    flow = flow_at_e()
    with pytest.raises(OutOfOrder):
        flow.reach(FlowStep.AUTHORISED)
