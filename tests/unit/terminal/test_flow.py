"""The service flow at the terminal: from the Ukey's insertion to service on, and what is refused on the way."""

import asyncio
import os
from collections.abc import Callable

import msgspec
import pytest

from cipherfleet.contract.errors import (
    CardUnconfirmed,
    CipherfleetError,
    CmkInvalid,
    Malformed,
    MarkMismatch,
    NoCapacity,
    TimedOut,
)
from cipherfleet.contract.ids import CardId, VcmId
from cipherfleet.contract.kmc_api import (
    DownloadSignal,
    LeaseRequested,
    ReleaseRefused,
    TerminalRefused,
)
from cipherfleet.contract.management_api import (
    DeletePermit,
    FlowFailed,
    IdentityWanted,
    Inserted,
    LoginFailed,
    LoginPermit,
    Removed,
    ServiceOffSeen,
    ServiceOn,
)
from cipherfleet.contract.statements import Purpose
from cipherfleet.contract.vcm_api import LoginReply
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.unit.terminal.platform import PIN, Platform, StandInCard
from tests.unit.terminal.running import Running

OTHER_VCM = VcmId("vcm-ffffffffffff")


async def test_the_whole_flow_to_service_on(enrolled: Platform, terminal: Running) -> None:
    enrolled.kmc.grow(3)
    await enrolled.management.line.hears(Inserted)
    vcm = await enrolled.create(inserted=False)
    info = await terminal.on
    assert (info.consumer, info.vcm, info.endpoint) == ("acme", vcm.id, vcm.endpoint)
    assert [entry.step for entry in info.trace] == [9]
    assert terminal.steps() == [
        "kmc-connected",
        "management-connected",
        "inserted",
        "identity-proven",
        "login-permit",
        "download-signal",
        "cmk-released",
        "logged-in",
        "service-on",
    ]
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        assert ukey.memory.seen == enrolled.kmc.point()


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: msgspec.structs.replace(reply, confirmation=os.urandom(32)),
        lambda reply: msgspec.structs.replace(reply, confirmation=b""),
        lambda reply: msgspec.structs.replace(reply, card=CardId("card-m2-00000000")),
        lambda reply: msgspec.structs.replace(reply, vcm=OTHER_VCM),
    ],
)
async def test_a_card_that_does_not_confirm_is_given_up(
    enrolled: Platform, terminal: Running, change: Callable[[LoginReply], LoginReply]
) -> None:
    vcm = await enrolled.permitted()
    await enrolled.signal(vcm)
    await enrolled.released(vcm)
    vcm.reply = change
    vcm.serving = True
    failed = await enrolled.management.line.hears(LoginFailed)
    assert (failed.vcm, failed.code) == (vcm.id, CardUnconfirmed.code)
    await enrolled.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16)))
    await terminal.tells("lease-refused")
    await enrolled.management.line.say(FlowFailed(failed.code, failed.message))
    with pytest.raises(CardUnconfirmed):
        await terminal.ends()


async def test_a_vcm_that_never_serves_is_given_up(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.permitted()
    await enrolled.signal(vcm)
    await enrolled.released(vcm)
    failed = await enrolled.management.line.hears(LoginFailed)
    assert failed.code == TimedOut.code
    assert len(vcm.logins) > 3
    with pytest.raises(TimedOut):  # management says nothing more, so the terminal's own finding is the error
        await terminal.ends()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "https://", "ftp://x", "https://127.0.0.1:1/path", "127.0.0.1:1"])
async def test_a_permit_does_not_lead_off_tls(enrolled: Platform, terminal: Running, endpoint: str) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    await enrolled.management.line.say(LoginPermit(OTHER_VCM, endpoint, os.urandom(32)))
    failed = await enrolled.management.line.hears(LoginFailed)
    assert (failed.vcm, failed.code) == (OTHER_VCM, Malformed.code)


async def test_a_vcm_of_another_domain_is_not_logged_in_to(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    vcm, foreign = await enrolled.vcm(), await enrolled.vcm()
    vcm.endpoint = foreign.endpoint
    await enrolled.permit(vcm)
    failed = await enrolled.management.line.hears(LoginFailed)
    assert failed.code == "certificate-invalid"
    assert foreign.logins == []


OUT_OF_ORDER = [
    ServiceOn(OTHER_VCM),
    LoginPermit(OTHER_VCM, "https://127.0.0.1:1", os.urandom(32)),
    IdentityWanted(b"short", Purpose.BUILD_VCM),
    IdentityWanted(os.urandom(32), Purpose.BUILD_VCM, OTHER_VCM),
    IdentityWanted(os.urandom(32), Purpose.DELETE_VCM),
]


@pytest.mark.parametrize("frame", OUT_OF_ORDER)
async def test_what_comes_out_of_turn_has_no_effect(enrolled: Platform, terminal: Running, frame: object) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.management.line.say(frame)
    await terminal.tells("out-of-order")
    assert enrolled.management.line.sent.empty()
    await enrolled.create(inserted=False)
    await terminal.on


async def test_a_permit_with_half_a_mark(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    await enrolled.management.line.say(LoginPermit(OTHER_VCM, "https://127.0.0.1:1", b"half"))
    await terminal.tells("out-of-order")


@pytest.mark.parametrize("raw", [b"", b"{", b'{"type":"Nonsense"}', b'{"type":"LoginPermit"}', b"[]", b"\xff\xfe", b"null"])
async def test_malformed_frames_close_the_channel_and_it_comes_again(enrolled: Platform, terminal: Running, raw: bytes) -> None:
    for line in (enrolled.kmc.line, enrolled.management.line):
        await asyncio.wait_for(line.arrived.wait(), 5)
    await enrolled.management.line.hears(Inserted)
    await enrolled.management.line.say_raw(raw)
    await enrolled.management.line.hears(Inserted)
    await enrolled.kmc.line.say_raw(raw)
    await terminal.tells("kmc-connected", times=2)
    assert (enrolled.management.line.connections, enrolled.kmc.line.connections) == (2, 2)
    await enrolled.create(inserted=False)
    await terminal.on


async def test_more_signals_than_can_wait(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    card = StandInCard(enrolled.kmc.platform)
    checkpoint = await enrolled.kmc.checkpoint()
    for number in range(65):
        await enrolled.kmc.line.say(DownloadSignal(VcmId(f"vcm-{number:012x}"), os.urandom(32), card.id, card.chain, checkpoint, ()))
    refused = await enrolled.kmc.line.hears(ReleaseRefused)
    assert (refused.vcm, refused.code) == (f"vcm-{64:012x}", MarkMismatch.code)


async def test_a_failure_before_service_is_the_terminals(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    await enrolled.management.line.say(FlowFailed(NoCapacity.code, "no machine is free", "add one"))
    with pytest.raises(NoCapacity) as caught:
        await terminal.ends()
    assert caught.value.hint == "add one"
    await enrolled.management.line.hears(Removed)


async def test_a_failure_after_service_is_tried_again(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    await enrolled.management.line.say(DeletePermit(vcm.id))
    await enrolled.management.line.hears(ServiceOffSeen)
    await enrolled.identify()
    await enrolled.management.line.say(FlowFailed(NoCapacity.code, "no machine is free"))
    await enrolled.create()
    await terminal.tells("service-on", times=2)


async def test_a_final_failure_after_service_ends_the_terminal(enrolled: Platform, terminal: Running) -> None:
    await enrolled.create()
    await enrolled.management.line.say(FlowFailed(CmkInvalid.code, "the CMK does not open"))
    with pytest.raises(CmkInvalid):
        await terminal.ends()


async def test_the_terminal_goes_on_when_another_vcm_fails(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    await enrolled.management.line.say(FlowFailed(NoCapacity.code, "no machine is free"))
    await enrolled.lease(vcm)
    assert enrolled.management.line.sent.empty()


@pytest.mark.parametrize(
    ("line", "frame"),
    [("kmc", TerminalRefused("exists", "taken over")), ("management", FlowFailed("already-running", "taken over"))],
)
async def test_a_terminal_that_was_replaced_goes_without_a_goodbye(enrolled: Platform, terminal: Running, line: str, frame: object) -> None:
    await enrolled.create()
    await (enrolled.kmc if line == "kmc" else enrolled.management).line.say(frame)
    with pytest.raises(CipherfleetError):
        await terminal.ends()
    assert enrolled.kmc.line.sent.empty()
    assert enrolled.management.line.sent.empty()


async def test_a_revoked_service_is_asked_for_again(enrolled: Platform, terminal: Running) -> None:
    await enrolled.create()
    await enrolled.kmc.line.say(TerminalRefused("lease-expired", "service was revoked"))
    assert enrolled.kmc.line.frames is not None
    await enrolled.kmc.line.frames.close()
    await terminal.tells("kmc-connected", times=2)


async def test_a_refusal_before_service_is_the_terminals(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.kmc.line.say(TerminalRefused("cmk-invalid", "the CMK does not open"))
    with pytest.raises(CmkInvalid):
        await terminal.ends()


async def test_a_deletion_signed_by_the_ukey(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    request = await enrolled.identify(Purpose.DELETE_VCM, vcm.id)
    assert request.purpose is Purpose.DELETE_VCM
    await enrolled.management.line.say(DeletePermit(vcm.id))
    assert (await enrolled.management.line.hears(ServiceOffSeen)).vcm == vcm.id
    assert (await terminal.tells("service-off")).detail == "no crypto-service offered"
    await enrolled.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16)))
    await terminal.tells("lease-refused")
    # The terminal stays, idle: it asks for nothing, but the operator may have one built.
    assert not terminal.task.done()
    await enrolled.create(inserted=False)
    await terminal.tells("service-on", times=2)


async def test_deleting_what_is_gone_succeeds(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.management.line.say(DeletePermit(OTHER_VCM))
    assert (await enrolled.management.line.hears(ServiceOffSeen)).vcm == OTHER_VCM


async def test_a_second_vcm_beside_the_first(enrolled: Platform, terminal: Running) -> None:
    first = await enrolled.create()
    second = await enrolled.create(inserted=False)
    await enrolled.lease(first)
    await enrolled.lease(second)
    await enrolled.management.line.say(DeletePermit(first.id))
    await enrolled.management.line.hears(ServiceOffSeen)
    await enrolled.lease(second)


async def test_a_vcm_that_falls_silent_is_asked_for_again(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    lost = await terminal.tells("service-lost")  # nobody asked for a lease
    assert lost.vcm == vcm.id
    await enrolled.create()
    await terminal.tells("service-on", times=2)
