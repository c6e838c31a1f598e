"""What the terminal gives to the KMC, and what not: the CMK, and the heartbeats of the lease."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import (
    CardUntrusted,
    CheckpointForged,
    CipherfleetError,
    EscrowRolledBack,
    MarkMismatch,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, VcmId
from cipherfleet.contract.kmc_api import (
    LeaseRequested,
    ReleaseRefused,
    UkeyRemoved,
)
from cipherfleet.contract.management_api import (
    FlowFailed,
    Inserted,
    LoginFailed,
    Removed,
)
from cipherfleet.contract.statements import CheckpointStatement
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.pki import Authority
from tests.unit.terminal.platform import ACME, PIN, Platform, StandInCard
from tests.unit.terminal.running import Running

OTHER_VCM = VcmId("vcm-ffffffffffff")


async def test_the_share_names_the_ukey_and_what_it_saw(enrolled: Platform, terminal: Running) -> None:
    enrolled.kmc.grow(2)
    vcm = await enrolled.permitted()
    await enrolled.signal(vcm)
    share = await enrolled.released(vcm)
    assert (share.consumer, share.card, share.vcm) == (ACME, vcm.card.id, vcm.id)
    assert share.ukey_public_keys == (enrolled.kmc.identity_key,)
    assert (share.epoch, share.sequence, share.head) == msgspec.structs.astuple(enrolled.kmc.point())
    assert len(share.ukey_share) == 32


async def test_a_signal_that_comes_before_its_permit_waits(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    vcm = await enrolled.vcm()
    await enrolled.signal(vcm)
    await terminal.tells("download-signal")
    assert enrolled.kmc.line.sent.empty()
    await enrolled.permit(vcm)
    await enrolled.released(vcm)
    await enrolled.serve(vcm)
    await terminal.on


async def test_a_waiting_signal_lets_the_checkpoint_move_on(enrolled: Platform, terminal: Running) -> None:
    first = await enrolled.create()
    second = await enrolled.vcm()
    await enrolled.signal(second)
    await terminal.tells("download-signal", times=2)
    enrolled.kmc.grow(2)
    await enrolled.lease(first, checkpoint=await enrolled.kmc.checkpoint(), log=tuple(enrolled.kmc.log))
    await enrolled.identify()
    await enrolled.permit(second)
    assert (await enrolled.released(second)).sequence == 2


async def test_a_signal_without_a_permit_is_refused_in_the_end(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    vcm = await enrolled.vcm()
    await enrolled.signal(vcm)
    refused = await enrolled.kmc.line.hears(ReleaseRefused)
    assert (refused.vcm, refused.code) == (vcm.id, MarkMismatch.code)


async def test_a_signal_with_another_mark_releases_nothing(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.permitted()
    await enrolled.signal(vcm, mark=os.urandom(32))
    await _refused(enrolled, terminal, vcm.id, MarkMismatch)


async def test_the_mark_is_good_once(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    await enrolled.signal(vcm)
    refused = await enrolled.kmc.line.hears(ReleaseRefused)
    assert refused.code == MarkMismatch.code
    await enrolled.lease(vcm)  # the running service is none the worse


def _foreign_root(platform: Platform) -> StandInCard:
    return StandInCard(Authority("root").subordinate("platform"))


def _machine_certificate(platform: Platform) -> StandInCard:
    return StandInCard(platform.kmc.platform, identity=Identity(Role.MACHINE, "m1"))


def _other_card(platform: Platform) -> StandInCard:
    return StandInCard(platform.kmc.platform, identity=Identity(Role.CARD, "card-m1-ffffffff"))


def _no_transport_key(platform: Platform) -> StandInCard:
    card = StandInCard(platform.kmc.platform)
    card.chain = platform.kmc.platform.certify(Identity(Role.CARD, card.id), new_key().public_key())
    return card


def _short_transport_key(platform: Platform) -> StandInCard:
    card = StandInCard(platform.kmc.platform)
    card.chain = platform.kmc.platform.certify(Identity(Role.CARD, card.id), new_key().public_key(), hpke_public_key=b"short")
    return card


def _impossible_transport_key(platform: Platform) -> StandInCard:
    card = StandInCard(platform.kmc.platform)
    key = b"\xff" * 1184 + bytes(32)
    card.chain = platform.kmc.platform.certify(Identity(Role.CARD, card.id), new_key().public_key(), hpke_public_key=key)
    return card


def _expired(platform: Platform) -> StandInCard:
    card = StandInCard(platform.kmc.platform)
    card.chain = platform.kmc.platform.certify(
        Identity(Role.CARD, card.id), new_key().public_key(), hpke_public_key=card.transport_key, lifetime=timedelta(minutes=-1)
    )
    return card


def _garbage(platform: Platform) -> StandInCard:
    card = StandInCard(platform.kmc.platform)
    card.chain = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    return card


@pytest.mark.parametrize(
    "make",
    [
        _foreign_root,
        _machine_certificate,
        _other_card,
        _no_transport_key,
        _short_transport_key,
        _impossible_transport_key,
        _expired,
        _garbage,
    ],
)
async def test_a_card_that_is_not_to_be_trusted_gets_nothing(
    enrolled: Platform, terminal: Running, make: Callable[[Platform], StandInCard]
) -> None:
    vcm = await enrolled.permitted(make(enrolled))
    await enrolled.signal(vcm)
    await _refused(enrolled, terminal, vcm.id, CardUntrusted)


async def _rolled_back(platform: Platform) -> dict[str, Any]:
    return {"checkpoint": await platform.kmc.checkpoint(log=platform.kmc.log[:1]), "log": tuple(platform.kmc.log[:1])}


async def _forked(platform: Platform) -> dict[str, Any]:
    forked = [msgspec.structs.replace(platform.kmc.log[0], digest=os.urandom(32)), *platform.kmc.log[1:]]
    return {"checkpoint": await platform.kmc.checkpoint(log=forked), "log": tuple(forked)}


async def _forked_and_longer(platform: Platform) -> dict[str, Any]:
    platform.kmc.log[0] = msgspec.structs.replace(platform.kmc.log[0], digest=os.urandom(32))
    platform.kmc.grow()
    return {"checkpoint": await platform.kmc.checkpoint(), "log": tuple(platform.kmc.log)}


async def _with_a_gap(platform: Platform) -> dict[str, Any]:
    platform.kmc.grow(2)
    return {"checkpoint": await platform.kmc.checkpoint(), "log": tuple(platform.kmc.log[3:])}


async def _of_another_epoch(platform: Platform) -> dict[str, Any]:
    return {"checkpoint": await platform.kmc.checkpoint(epoch=2), "log": tuple(platform.kmc.log)}


async def _by_somebody_else(platform: Platform) -> dict[str, Any]:
    platform.kmc.grow()
    return {"checkpoint": await platform.kmc.checkpoint(signer=LocalSigner(new_key())), "log": tuple(platform.kmc.log)}


async def _for_somebody_else(platform: Platform) -> dict[str, Any]:
    point = platform.kmc.point()
    statement = CheckpointStatement("globex", point.epoch, point.sequence, point.head)  # type: ignore[arg-type]
    return {"checkpoint": await signing.sign(statement, platform.kmc.signer), "log": ()}


HISTORIES = [
    (_rolled_back, EscrowRolledBack),
    (_forked, EscrowRolledBack),
    (_forked_and_longer, EscrowRolledBack),
    (_with_a_gap, EscrowRolledBack),
    (_of_another_epoch, EscrowRolledBack),
    (_by_somebody_else, CheckpointForged),
    (_for_somebody_else, CheckpointForged),
]


@pytest.mark.parametrize(("history", "error"), HISTORIES)
async def test_an_escrow_whose_history_changed_ends_the_service(
    enrolled: Platform, terminal: Running, history: Callable[[Platform], Any], error: type[CipherfleetError]
) -> None:
    enrolled.kmc.grow(2)
    vcm = await enrolled.create()
    seen = enrolled.kmc.point()
    await enrolled.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16), **await history(enrolled)))
    with pytest.raises(error):
        await terminal.ends()
    await enrolled.kmc.line.hears(UkeyRemoved)
    await enrolled.management.line.hears(Removed)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        assert ukey.memory.seen == seen


async def test_a_rolled_back_escrow_gets_no_cmk(enrolled: Platform, terminal: Running) -> None:
    enrolled.kmc.grow(2)
    vcm = await enrolled.create()
    await enrolled.identify()
    second = await enrolled.vcm()
    await enrolled.permit(second)
    await enrolled.signal(second, **await _rolled_back(enrolled))
    refused = await enrolled.kmc.line.hears(ReleaseRefused)
    assert (refused.vcm, refused.code) == (second.id, EscrowRolledBack.code)
    with pytest.raises(EscrowRolledBack):
        await terminal.ends()
    assert vcm.serving


async def test_the_checkpoint_moves_on_with_the_leases(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    for _ in range(2):
        enrolled.kmc.grow()
        await enrolled.lease(vcm, checkpoint=await enrolled.kmc.checkpoint(), log=tuple(enrolled.kmc.log[-1:]))
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        assert ukey.memory.seen.sequence == 2
        assert ukey.memory.seen == enrolled.kmc.point()


@pytest.mark.parametrize(
    "change",
    [
        {"vcm": OTHER_VCM},
        {"card": CardId("card-m1-ffffffff")},
        {"nonce": b"short"},
        {"nonce": b""},
    ],
)
async def test_a_lease_that_nobody_of_ours_wants_is_not_signed(enrolled: Platform, terminal: Running, change: dict[str, Any]) -> None:
    vcm = await enrolled.create()
    request = LeaseRequested(vcm.id, vcm.card.id, os.urandom(16))
    await enrolled.kmc.line.say(msgspec.structs.replace(request, **change))
    await terminal.tells("lease-refused")
    assert enrolled.kmc.line.sent.empty()
    await enrolled.lease(vcm)


async def test_no_lease_before_the_cmk_was_released(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.permitted()
    await enrolled.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16)))
    await terminal.tells("lease-refused")
    assert enrolled.kmc.line.sent.empty()


async def _refused(platform: Platform, terminal: Running, vcm: VcmId, error: type[CipherfleetError]) -> None:
    """KMC and management are told, nothing was released; what management then says ends the terminal."""
    refused = await platform.kmc.line.hears(ReleaseRefused)
    assert (refused.vcm, refused.code) == (vcm, error.code)
    failed = await platform.management.line.hears(LoginFailed)
    assert (failed.vcm, failed.code) == (vcm, error.code)
    await platform.management.line.say(FlowFailed(failed.code, failed.message))
    with pytest.raises(error):
        await terminal.ends()
