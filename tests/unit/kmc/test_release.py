"""The CMK's way to a card, and leases: every order, replay, forgery and loss that a peer can cause."""

import asyncio
import secrets

import pytest
from msgspec import structs

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import HPKE_KEY_OID, check_chain, identity_of, new_key
from cipherfleet.contract.errors import (
    CardUntrusted,
    CmkInvalid,
    ConsumerUnknown,
    EscrowRolledBack,
    HsmUnavailable,
    LeaseForeign,
    LeaseForged,
    LeaseReplayed,
    LimitReached,
    Malformed,
    OutOfOrder,
    ServiceOff,
)
from cipherfleet.contract.escrow import LogEntry, RowWrite, Seen, genesis, replay
from cipherfleet.contract.ids import ConsumerId, MachineId, new_card_id, new_vcm_id
from cipherfleet.contract.kmc_api import (
    CardReady,
    CertificatesRevoked,
    CmkDelivered,
    CmkLoaded,
    CmkRefused,
    CmkReleased,
    DownloadSignal,
    EscrowChanged,
    LeaseGranted,
    LeaseRequested,
    LeaseSigned,
    LeaseWanted,
    ReleaseRefused,
    Serving,
    TerminalRefused,
)
from cipherfleet.contract.statements import CheckpointStatement, IdentityRequest, LeaseStatement, Purpose, Signed
from cipherfleet.kmc.hsm import KeyHandle
from cipherfleet.kmc.pace import Pace
from tests.unit.kmc.world import SEALED, Conversation, TestConsumer, TestVcm, World, key_row, start_vcm


async def ready(world: World, since: int = 0) -> tuple[TestConsumer, Conversation, TestVcm]:
    """A consumer whose terminal has the download signal of its VCM."""
    alice = await world.enrol()
    terminal = await alice.plug_in(since)
    vcm = await start_vcm(world, alice)
    await vcm.channel.send(CardReady(vcm.card))
    return alice, terminal, vcm


async def serving(world: World) -> tuple[TestConsumer, Conversation, TestVcm]:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    return alice, terminal, await start_vcm(world, alice, terminal)


async def refusal(terminal: Conversation) -> str:
    frames = await terminal.closed()
    assert isinstance(frames[-1], TerminalRefused), frames
    return frames[-1].code


# -- the CMK -----------------------------------------------------------------------------------------------------------


async def test_the_signal_shows_the_card_and_where_the_escrow_stands(world: World) -> None:
    alice, terminal, vcm = await ready(world)
    signal = await terminal.next(DownloadSignal)
    assert (signal.vcm, signal.card, signal.mark) == (vcm.id, vcm.card, vcm.token.mark)
    leaf = check_chain(signal.card_chain, alice.reply.root)
    assert identity_of(leaf).id == vcm.card
    assert leaf.extensions.get_extension_for_oid(HPKE_KEY_OID).value.public_bytes() == bytes(1216)
    checkpoint = signing.verify(signal.checkpoint, CheckpointStatement, [alice.reply.kmc_signing_key])
    assert (checkpoint.consumer, checkpoint.sequence, signal.log) == ("alice", 0, ())


async def test_the_log_goes_on_from_where_the_ukey_was(world: World) -> None:
    alice = await world.enrol()
    for name in ("one", "two", "three"):
        await alice.application(name)
    terminal = await alice.plug_in(since=1)
    vcm = await start_vcm(world, alice)
    await vcm.channel.send(CardReady(vcm.card))
    signal = await terminal.next(DownloadSignal)
    assert [entry.sequence for entry in signal.log] == [2, 3]
    checkpoint = signing.verify(signal.checkpoint, CheckpointStatement, [alice.reply.kmc_signing_key])
    whole = (await world.kmc.escrow.since(alice.name, 0))[2]
    start = replay(Seen(1, 0, genesis(alice.name, 1)), whole[:1])
    assert replay(start, signal.log) == Seen(checkpoint.epoch, checkpoint.sequence, checkpoint.head)


async def test_a_terminal_that_comes_later_gets_the_signal(world: World) -> None:
    alice = await world.enrol()
    vcm = await start_vcm(world, alice)
    await vcm.channel.send(CardReady(vcm.card))
    terminal = await alice.plug_in()
    assert (await terminal.next(DownloadSignal)).vcm == vcm.id


async def test_a_vcm_that_lost_its_channel_gets_the_cmk_again(world: World) -> None:
    alice, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
    await vcm.channel.next(CmkDelivered)
    await vcm.join()  # before it could load
    await vcm.channel.send(CardReady(vcm.card))
    assert (await vcm.channel.next(CmkDelivered)).sealed_ukey_share == SEALED
    await vcm.channel.send(CmkLoaded())
    await vcm.heartbeat(terminal)


async def test_a_vcm_that_asks_again_and_again_gets_the_cmk_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each delivery is a turn of the HSM's that all other consumers' leases wait for."""
    alice, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    rewraps = 0
    real = world.hsm.rewrap

    async def counted(handle: KeyHandle, wrapped: bytes, recipient: bytes) -> bytes:
        nonlocal rewraps
        rewraps += 1
        return await real(handle, wrapped, recipient)

    monkeypatch.setattr(world.hsm, "rewrap", counted)
    await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
    for _ in range(50):
        await vcm.channel.send(CardReady(vcm.card))
    await vcm.channel.next(CmkDelivered)
    await vcm.channel.send(CmkLoaded())
    await vcm.heartbeat(terminal)
    assert rewraps == 1


async def test_a_terminal_that_joins_too_often_is_refused(world: World) -> None:
    alice = await world.enrol()
    world.kmc.service._joins = Pace(1 / 3600, 2)
    for _ in range(2):
        await alice.plug_in()
    assert await refusal(await alice.plug_in()) == LimitReached.code


@pytest.mark.parametrize(
    ("ciphertext", "sealed", "error"),
    [
        (bytes(40), SEALED, CmkInvalid),
        (b"short", SEALED, CmkInvalid),
        (bytes(4000), SEALED, CmkInvalid),
        (bytes(40), b"", Malformed),
        (bytes(40), bytes(16 * 1024 + 1), Malformed),
    ],
)
async def test_a_wrong_release_is_refused(world: World, ciphertext: bytes, sealed: bytes, error: type[Malformed]) -> None:
    alice, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    await terminal.send(CmkReleased(vcm.id, ciphertext, sealed))
    assert await refusal(terminal) == error.code
    state = await world.kmc.service.state(vcm.id)
    assert not state.released
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    assert not session.ciphertext_cmk
    assert error.code in [outcome for _, outcome in await world.audit_lines("alice")]


async def test_a_release_without_a_signal_is_refused(world: World) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice)
    await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
    assert await refusal(terminal) == OutOfOrder.code


async def test_a_release_counts_once(world: World) -> None:
    alice, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    for _ in range(2):
        await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
    assert await refusal(terminal) == OutOfOrder.code


async def test_a_release_for_a_vcm_that_is_gone_is_nothing(world: World) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    await terminal.send(CmkReleased(new_vcm_id(), alice.reply.ciphertext_cmk, SEALED))
    vcm = await start_vcm(world, alice, terminal)
    assert (await world.kmc.service.state(vcm.id)).released


async def test_a_refused_release_is_audited(world: World) -> None:
    _, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    await terminal.send(ReleaseRefused(vcm.id, EscrowRolledBack.code, "older than seen"))
    async with asyncio.timeout(20):
        while ("cmk-release-refused", EscrowRolledBack.code) not in await world.audit_lines("alice"):
            await asyncio.sleep(0.01)


async def test_a_card_that_refuses_the_cmk_is_audited(world: World) -> None:
    alice, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
    await vcm.channel.next(CmkDelivered)
    await vcm.channel.send(CmkRefused(CmkInvalid.code, "no"))
    async with asyncio.timeout(20):
        while ("cmk-loaded", CmkInvalid.code) not in await world.audit_lines("alice"):
            await asyncio.sleep(0.01)


async def test_the_release_waits_for_an_hsm_that_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, terminal, vcm = await ready(world)
    await terminal.next(DownloadSignal)
    tried = asyncio.Event()

    async def away(handle: KeyHandle, wrapped: bytes, recipient: bytes) -> bytes:
        tried.set()
        raise HsmUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.hsm, "rewrap", away)
        await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
        async with asyncio.timeout(20):
            await tried.wait()
    await vcm.channel.next(CmkDelivered)


async def test_frames_out_of_order_close_a_vcms_channel(world: World) -> None:
    alice = await world.enrol()
    vcm = await start_vcm(world, alice)
    for frame in (
        CmkLoaded(),
        Serving(),
        CardReady(new_card_id(MachineId("m1"))),
        LeaseWanted(new_card_id(MachineId("m1")), bytes(16)),
        LeaseWanted(vcm.card, b"short"),
    ):
        await vcm.channel.send(frame)
        assert await vcm.channel.closed() == []
        await vcm.join()
    outcomes = [outcome for event, outcome in await world.audit_lines("alice") if event == "vcm-channel"]
    assert outcomes == [OutOfOrder.code, OutOfOrder.code, CardUntrusted.code, CardUntrusted.code, Malformed.code]


async def test_garbage_closes_a_channel(world: World) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice)
    for garbage in (b"{}", b"\xff", b'{"type":"Unknown"}', b'{"type":"CardReady","card":"../x"}'):
        await vcm.channel.frames.socket.send_bytes(garbage)
        await vcm.channel.closed()
        await vcm.join()
    await terminal.frames.socket.send_bytes(b'{"type":"LeaseSigned"}')
    assert await refusal(terminal) == Malformed.code


@pytest.mark.parametrize("since", ["x", "-1", "1e3", "9999999999", "", "٣"])
async def test_a_terminal_that_says_no_number(world: World, since: str) -> None:
    alice = await world.enrol()
    with pytest.raises(Malformed):
        await alice.terminal().call("GET", f"/v1/terminal?since={since}")


async def test_a_pending_consumers_terminal_is_refused(world: World) -> None:
    alice = await world.enrol(confirm=False)
    terminal = await alice.plug_in()
    assert await refusal(terminal) == ConsumerUnknown.code


# -- leases ------------------------------------------------------------------------------------------------------------


async def wanted(terminal: Conversation, vcm: TestVcm) -> bytes:
    nonce = secrets.token_bytes(16)
    await vcm.channel.send(LeaseWanted(vcm.card, nonce))
    assert (await terminal.next(LeaseRequested)).nonce == nonce
    return nonce


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"duration_ms": 6001}, LeaseForged),
        ({"duration_ms": 0}, LeaseForged),
        ({"duration_ms": -1}, LeaseForged),
        ({"card": new_card_id(MachineId("m1"))}, LeaseForeign),
        ({"consumer": "bob"}, LeaseForeign),
    ],
)
async def test_a_wrong_lease_is_refused(world: World, changes: dict[str, object], error: type[LeaseForged]) -> None:
    alice, terminal, vcm = await serving(world)
    await terminal.send(await alice.lease(vcm, await wanted(terminal, vcm), **changes))
    assert await refusal(terminal) == error.code
    assert ("terminal-channel", error.code) in await world.audit_lines("alice")


async def test_a_forged_lease_is_refused(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    nonce = await wanted(terminal, vcm)
    good = (await alice.lease(vcm, nonce)).lease
    statement = LeaseStatement(alice.name, vcm.card, vcm.id, nonce, 1000, 0, 0, b"")
    other = signing.LocalSigner(new_key())
    forgeries = [
        await signing.sign(statement, other),
        structs.replace(good, signatures=()),
        structs.replace(good, payload=good.payload.replace(b"6000", b"5999")),
        structs.replace(good, kind=IdentityRequest.KIND),
        await signing.countersign(good, other),
        await signing.sign(IdentityRequest(alice.name, nonce, Purpose.BUILD_VCM), alice.signer),
    ]
    for forged in forgeries:
        await terminal.send(LeaseSigned(forged))
        assert await refusal(terminal) == LeaseForged.code
        terminal = await alice.plug_in()
        await terminal.next(LeaseRequested)  # what waits is asked for again
    await terminal.send(LeaseSigned(good))
    await vcm.channel.next(LeaseGranted)


async def test_a_lease_counts_once(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    lease = await alice.lease(vcm, await wanted(terminal, vcm))
    await terminal.send(lease)
    await vcm.channel.next(LeaseGranted)
    await terminal.send(lease)
    assert await refusal(terminal) == LeaseReplayed.code


async def test_a_lease_that_no_card_waits_for_is_dropped(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    await terminal.send(await alice.lease(vcm, secrets.token_bytes(16)))
    await terminal.send(await alice.lease(vcm, bytes(16), vcm=new_vcm_id()))
    await vcm.heartbeat(terminal)


async def test_a_used_nonce_is_not_asked_for_again(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    nonce = await wanted(terminal, vcm)
    await terminal.send(await alice.lease(vcm, nonce))
    await vcm.channel.next(LeaseGranted)
    await vcm.channel.send(LeaseWanted(vcm.card, nonce))
    assert await vcm.channel.closed() == []


async def test_of_many_nonces_the_newest_count(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    nonces = [await wanted(terminal, vcm) for _ in range(12)]
    await terminal.send(await alice.lease(vcm, nonces[0]))  # dropped
    await terminal.send(await alice.lease(vcm, nonces[-1]))
    granted = await vcm.channel.next(LeaseGranted)
    assert signing.verify(granted.lease, LeaseStatement, [alice.signer.public_key]).nonce == nonces[-1]


async def test_a_flood_of_wishes_does_not_reach_the_ukey(world: World) -> None:
    _, terminal, vcm = await serving(world)
    for _ in range(40):
        await vcm.channel.send(LeaseWanted(vcm.card, secrets.token_bytes(16)))
    await vcm.channel.send(CmkRefused("end", ""))  # an order is kept: once this is audited, all were seen
    async with asyncio.timeout(20):
        while ("cmk-loaded", "end") not in await world.audit_lines("alice"):
            await asyncio.sleep(0.01)
    asked = 0
    try:
        while True:
            await terminal.next(LeaseRequested, timeout=0.1)
            asked += 1
    except TimeoutError:
        pass
    assert asked == 15  # 16 in a heartbeat, one was there before


async def test_a_lease_waits_for_an_hsm_that_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, terminal, vcm = await serving(world)
    lease = await alice.lease(vcm, await wanted(terminal, vcm))
    tried = asyncio.Event()

    async def away(handle: KeyHandle, data: bytes) -> bytes:
        tried.set()
        raise HsmUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.hsm, "sign", away)
        await terminal.send(lease)
        async with asyncio.timeout(20):
            await tried.wait()
        tried.clear()
        await alice_writes(vcm, tried)
        nonce = secrets.token_bytes(16)
        await vcm.channel.send(LeaseWanted(vcm.card, nonce))
        without = await terminal.next(LeaseRequested)
        assert without.checkpoint is None
    await terminal.send(lease)  # its nonce is not used up
    await vcm.channel.next(LeaseGranted)
    await terminal.send(await alice.lease(vcm, nonce))
    await vcm.channel.next(LeaseGranted)


async def alice_writes(vcm: TestVcm, tried: asyncio.Event) -> None:
    receipt = await vcm.write(RowWrite(key_row("alice")))
    assert receipt.log[0].sequence == 1
    assert not tried.is_set()  # a write needs no signature


async def test_a_changed_escrow_rides_along_with_the_next_lease(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    receipt = await vcm.write(RowWrite(key_row("alice")))
    nonce = secrets.token_bytes(16)
    await vcm.channel.send(LeaseWanted(vcm.card, nonce))
    asked = await terminal.next(LeaseRequested)
    assert asked.log == receipt.log
    assert asked.checkpoint is not None
    assert signing.verify(asked.checkpoint, CheckpointStatement, [alice.reply.kmc_signing_key]).sequence == 1
    await vcm.channel.send(LeaseWanted(vcm.card, secrets.token_bytes(16)))
    assert (await terminal.next(LeaseRequested)).checkpoint is None


async def test_a_terminal_that_comes_back_meanwhile_gets_no_log_with_a_gap(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request waits for the HSM while another terminal, which has seen less, takes over."""
    alice, terminal, vcm = await serving(world)
    await vcm.write(RowWrite(key_row("alice")))
    await vcm.heartbeat(terminal)  # told of entry 1
    await vcm.write(RowWrite(key_row("alice")))
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    assert session.told == 1
    waits, go = asyncio.Event(), asyncio.Event()
    since = world.kmc.escrow.since

    async def slow(consumer: ConsumerId, sequence: int) -> tuple[Seen, Signed, tuple[LogEntry, ...]]:
        found = await since(consumer, sequence)
        waits.set()
        await go.wait()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(world.kmc.escrow, "since", slow)
        nonce = secrets.token_bytes(16)
        await vcm.channel.send(LeaseWanted(vcm.card, nonce))
        async with asyncio.timeout(20):
            await waits.wait()
    newer = await alice.plug_in(since=0)
    whole = await newer.next(LeaseRequested)
    go.set()
    late = await newer.next(LeaseRequested)
    assert [entry.sequence for entry in whole.log] == [1, 2]
    assert (late.nonce, late.checkpoint, late.log) == (nonce, None, ())
    assert session.told == 2


async def test_what_no_terminal_heard_is_told_to_the_next(world: World) -> None:
    alice, _, vcm = await serving(world)
    await vcm.write(RowWrite(key_row("alice")))
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    session.terminal = None
    await world.kmc.service._release.request_lease(session, session.vcms[vcm.id], bytes(16))
    assert session.told == 0


async def test_other_vcms_learn_of_a_change(world: World) -> None:
    alice, terminal, first = await serving(world)
    second = await start_vcm(world, alice, terminal, machine=MachineId("m2"))
    await first.write(RowWrite(key_row("alice")))
    assert (await second.channel.next(EscrowChanged)).sequence == 1
    await alice.application()
    assert (await first.channel.next(EscrowChanged)).sequence == 2
    assert (await second.channel.next(EscrowChanged)).sequence == 2


async def test_a_new_card_ends_the_old_ones_leases(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    nonce = await wanted(terminal, vcm)
    await TestVcm(world, alice).put_card(await world.machine())
    await terminal.send(await alice.lease(vcm, nonce))
    await vcm.channel.send(LeaseWanted(vcm.card, secrets.token_bytes(16)))
    assert await vcm.channel.closed() == []
    assert ("vcm-channel", CardUntrusted.code) in await world.audit_lines("alice")


async def test_an_expired_certificate_gets_no_lease(world: World) -> None:
    _, _, vcm = await serving(world)
    session = world.kmc.service._sessions.get(ConsumerId("alice"))
    assert session is not None
    session.vcms[vcm.id].certified_until = 0
    await vcm.channel.send(LeaseWanted(vcm.card, secrets.token_bytes(16)))
    assert await vcm.channel.closed() == []
    assert ("vcm-channel", ServiceOff.code) in await world.audit_lines("alice")


async def test_a_restarted_kmc_goes_on_with_leases(world: World) -> None:
    alice, _, vcm = await serving(world)
    await world.restart()
    assert isinstance(await vcm.join(), CertificatesRevoked)
    await vcm.channel.send(CardReady(vcm.card))
    await vcm.channel.send(CmkLoaded())
    await vcm.channel.send(Serving())
    terminal = await alice.plug_in()
    await vcm.heartbeat(terminal)
    state = await world.kmc.service.state(vcm.id)
    assert (state.released, state.serving) == (True, True)
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    assert not session.ciphertext_cmk


async def test_a_later_signal_brings_what_is_new_alone(world: World) -> None:
    """With 100,000 keys the whole log would fit no frame."""
    alice = await world.enrol()
    terminal = await alice.plug_in()
    first = await start_vcm(world, alice, terminal)
    shown = []
    for _ in range(2):
        await first.write(RowWrite(key_row("alice")), RowWrite(key_row("alice")))
        other = await start_vcm(world, alice)
        await other.channel.send(CardReady(other.card))
        shown.append([entry.sequence for entry in (await terminal.next(DownloadSignal)).log])
    assert shown == [[1, 2], [3, 4]]
