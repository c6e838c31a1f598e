"""Service off: by the Ukey, the platform, a silent terminal, an unsigned lease; and what is refused from then on."""

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import Connection

from cipherfleet.channel.certificates import Credentials, key_to_pem, make_request
from cipherfleet.contract.errors import (
    CertificateExpired,
    CertificateInvalid,
    CertificateRevoked,
    ConsumerRevoked,
    ConsumerUnknown,
    DiskFull,
    Exists,
    KmcUnavailable,
    LeaseExpired,
    LimitReached,
    ServiceOff,
    StateConflict,
    TokenStale,
    UkeyAbsent,
    VcmUnknown,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import MachineId, TokenId, new_vcm_id
from cipherfleet.contract.kmc_api import (
    CertificatesRevoked,
    ChallengeRequest,
    ConsumerList,
    DownloadSignal,
    EnrolReply,
    IdentityReply,
    LeaseRequested,
    LeaseWanted,
    LogPage,
    Revoked,
    TerminalRefused,
    UkeyRemoved,
    VcmAuthorisation,
    VcmKmcState,
)
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.statements import Purpose
from cipherfleet.kmc import identity, revocation, store
from cipherfleet.kmc.requests import subject_key
from cipherfleet.kmc.revocation import UKEY_REMOVED
from tests.pki import refused_in_handshake
from tests.unit.kmc.world import FAST, Conversation, TestConsumer, TestVcm, World, start_vcm, world_in

SHORT = structs.replace(FAST, heartbeat_s=0.1, lease_s=0.3)


async def serving(world: World) -> tuple[TestConsumer, Conversation, TestVcm]:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    return alice, terminal, await start_vcm(world, alice, terminal)


async def assert_off(world: World, vcm: TestVcm) -> None:
    """Nothing of the VCM is left: certificate, connection, token, authorisation."""
    with pytest.raises((CertificateRevoked, KmcUnavailable)):
        await vcm.caller.call("GET", "/v1/escrow", reply=LogPage)
    with pytest.raises(CertificateRevoked):
        await vcm.call_with(vcm.chain).call("GET", "/v1/escrow", reply=LogPage)
    with pytest.raises(VcmUnknown):
        await (await world.management()).call("GET", f"/v1/vcms/{vcm.id}", reply=VcmKmcState)
    with pytest.raises(TokenStale):
        await vcm.certify(await world.machine())
    await world.restart()
    with pytest.raises(CertificateRevoked):
        await vcm.call_with(vcm.chain).call("GET", "/v1/escrow", reply=LogPage)


async def test_the_ukey_goes(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    memory = session.ciphertext_cmk
    assert bytes(memory) == alice.reply.ciphertext_cmk
    await terminal.send(UkeyRemoved())
    assert await vcm.channel.closed() == [Revoked(UKEY_REMOVED)]  # at once: a lease's end would say UkeyAbsent
    assert await terminal.closed() == []
    assert not memory
    assert world.kmc.service._sessions.get(alice.name) is None
    await assert_off(world, vcm)
    lines = [event for event, _ in await world.audit_lines("alice")]
    assert lines[-3:-1] == ["lease-stopped", "service-revoked"] or lines[-2:] == ["lease-stopped", "service-revoked"]


async def test_the_platform_turns_a_service_off(world: World) -> None:
    _, terminal, vcm = await serving(world)
    management = await world.management()
    await management.call("POST", "/v1/consumers/alice/revoke")
    await management.call("POST", "/v1/consumers/alice/revoke")
    assert await vcm.channel.closed() == [Revoked("service-off")]
    assert await terminal.closed() == [TerminalRefused(ServiceOff.code, "service was revoked: service-off")]
    assert [event for event, _ in await world.audit_lines("alice")].count("service-revoked") == 1
    await assert_off(world, vcm)


async def test_back_again(world: World) -> None:
    alice, terminal, _ = await serving(world)
    await terminal.send(UkeyRemoved())
    await terminal.closed()
    await start_vcm(world, alice, await alice.plug_in())


async def test_a_silent_terminal(tmp_path: Path) -> None:
    async with world_in(tmp_path, SHORT) as world:
        _, terminal, vcm = await serving(world)
        began = time.monotonic()
        await terminal.frames.close()
        assert await vcm.channel.closed() == [Revoked(UkeyAbsent.code)]
        assert time.monotonic() - began > 0.25
        await assert_off(world, vcm)


async def test_a_terminal_that_comes_back_in_time(tmp_path: Path) -> None:
    async with world_in(tmp_path, structs.replace(SHORT, lease_s=1.0)) as world:
        alice, terminal, vcm = await serving(world)
        await terminal.frames.close()
        again = await alice.plug_in()
        for _ in range(6):
            await vcm.heartbeat(again)
            await asyncio.sleep(0.2)
        assert (await world.kmc.service.state(vcm.id)).certified


async def test_a_terminal_that_does_not_sign(tmp_path: Path) -> None:
    async with world_in(tmp_path, SHORT) as world:
        _, terminal, vcm = await serving(world)
        await vcm.channel.send(LeaseWanted(vcm.card, secrets.token_bytes(16)))
        await terminal.next(LeaseRequested)
        assert await vcm.channel.closed() == [Revoked(LeaseExpired.code)]
        frames = await terminal.closed()
        assert isinstance(frames[-1], TerminalRefused)
        assert frames[-1].code == LeaseExpired.code


async def test_the_wall_clock_does_not_end_a_lease(tmp_path: Path) -> None:
    async with world_in(tmp_path) as world:
        _, terminal, vcm = await serving(world)
        for ahead in (-86400.0, 3600.0):
            world.clock.ahead = ahead
            await vcm.heartbeat(terminal)


async def test_a_restart_without_a_terminal(tmp_path: Path) -> None:
    async with world_in(tmp_path, SHORT) as world:
        _, terminal, vcm = await serving(world)
        await world.restart()
        del terminal
        async with asyncio.timeout(20):
            while ("service-revoked", "ok") not in await world.audit_lines("alice"):
                await asyncio.sleep(0.02)
        await assert_off(world, vcm)


async def test_a_second_terminal_takes_over(world: World) -> None:
    alice, first, vcm = await serving(world)
    second = await alice.plug_in()
    frames = await first.closed()
    assert isinstance(frames[-1], TerminalRefused)
    assert frames[-1].code == Exists.code
    await vcm.heartbeat(second)


async def test_one_vcm_of_two(world: World) -> None:
    alice, terminal, first = await serving(world)
    second = await start_vcm(world, alice, terminal, machine=MachineId("m2"))
    management = await world.management()
    await management.call("DELETE", f"/v1/vcms/{first.id}")
    assert (await first.channel.closed())[-1] == Revoked("vcm-deleted")
    told = await second.channel.next(CertificatesRevoked)
    assert len(told.serials) == 1
    await second.heartbeat(terminal)
    await management.call("DELETE", f"/v1/vcms/{first.id}")
    await management.call("DELETE", f"/v1/vcms/{new_vcm_id()}")
    assert [event for event, _ in await world.audit_lines("alice")].count("vcm-revoked") == 1
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    assert session.ciphertext_cmk
    await management.call("DELETE", f"/v1/vcms/{second.id}")
    assert not session.ciphertext_cmk  # nothing is left that it is for
    await assert_off(world, second)


async def test_deletion_by_the_ukey(world: World) -> None:
    alice, _, vcm = await serving(world)
    management = await world.management()
    request = await alice.identity_request(management, Purpose.DELETE_VCM, vcm.id)
    reply = await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    assert (reply.vcm, reply.token, reply.token_id) == (vcm.id, b"", None)
    assert (await vcm.channel.closed())[-1] == Revoked(Purpose.DELETE_VCM)
    again = await alice.identity_request(management, Purpose.DELETE_VCM, vcm.id)
    await management.call("POST", "/v1/identity/verify", again, reply=IdentityReply)  # what is gone is deleted
    await assert_off(world, vcm)


async def test_a_token(world: World) -> None:
    alice = await world.enrol()
    management = await world.management()
    free = await alice.token(management)
    for _ in range(2):
        await management.call("DELETE", f"/v1/tokens/{free.token_id}")
    await management.call("DELETE", f"/v1/tokens/{TokenId('0' * 16)}")
    vcm = await start_vcm(world, alice)
    await management.call("DELETE", f"/v1/tokens/{vcm.token.token_id}")
    assert await vcm.channel.closed() == [Revoked("token-revoked")]
    await assert_off(world, vcm)


async def test_nothing_is_issued_to_what_is_revoked_meanwhile(world: World) -> None:
    """A certificate on its way while the service goes off: whoever wins, nothing stays valid."""
    alice = await world.enrol()
    management, machine = await world.management(), await world.machine()
    for _ in range(5):
        vcm = TestVcm(world, alice)
        await vcm.put_card(machine)
        await vcm.authorise(management)
        await asyncio.gather(
            vcm.certify(machine),
            world.kmc.service.revoke.service(alice.name, "service-off", actor="test"),
            return_exceptions=True,
        )
        assert world.center.registry.serials(Role.VCM, alice.name) == ()


async def test_off_even_when_the_disk_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, vcm = await serving(world)

    async def full(*_: object) -> None:
        raise DiskFull("no space left")

    management = await world.management()
    with monkeypatch.context() as patch:
        patch.setattr(world.center.database, "write", full)
        with pytest.raises(DiskFull):
            await management.call("POST", "/v1/consumers/alice/revoke")
    assert await vcm.channel.closed() == [Revoked("service-off")]
    with pytest.raises(CertificateRevoked):
        await vcm.call_with(vcm.chain).call("GET", "/v1/escrow", reply=LogPage)


async def test_what_the_disk_refused_is_tried_until_it_is_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, _, vcm = await serving(world)
    management, space, tries = await world.management(), asyncio.Event(), 0
    write = world.center.database.write

    async def full(work: Callable[[Connection], object], committed: Callable[[object], object] = lambda _: None) -> object:
        nonlocal tries
        tries += 1
        if not space.is_set():
            raise DiskFull("no space left")
        return await write(work, committed)

    monkeypatch.setattr(revocation, "RETRY_S", 0.01)
    monkeypatch.setattr(revocation, "RETRY_MAX_S", 0.1)
    monkeypatch.setattr(world.center.database, "write", full)
    for _ in range(2):
        with pytest.raises(DiskFull):
            await management.call("POST", "/v1/consumers/alice/revoke")
    assert world.kmc.service.revoke._unsettled == {alice.name: {"service-off"}}
    with pytest.raises(ServiceOff):
        world.kmc.service.revoke.check_settled(alice.name)
    with pytest.raises(ServiceOff):
        await management.call("POST", "/v1/identity/challenges", ChallengeRequest(alice.name))
    async with asyncio.timeout(20):
        while tries < 5:
            await asyncio.sleep(0.01)
        space.set()
        while world.kmc.service.revoke._unsettled[alice.name]:
            await asyncio.sleep(0.01)
    await assert_off(world, vcm)
    await alice.token(await world.management())


# -- a stolen Ukey -----------------------------------------------------------------------------------------------------


async def test_a_stolen_ukey(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    management, operator = await world.management(), await world.operator()
    answer = await alice.identity_request(management)
    free = await alice.token(management)
    await operator.call("POST", "/v1/consumers/alice/revoke-ukey")
    assert await vcm.channel.closed() == [Revoked(ConsumerRevoked.code)]
    last = (await terminal.closed())[-1]
    assert isinstance(last, TerminalRefused)
    assert last.code == ConsumerRevoked.code
    for _ in range(2):  # and after a restart
        with pytest.raises(ConsumerRevoked):
            await management.call("POST", "/v1/identity/challenges", ChallengeRequest(alice.name))
        with pytest.raises(ConsumerRevoked):
            await management.call("POST", "/v1/identity/verify", answer)
        with pytest.raises(ConsumerRevoked):
            order = VcmAuthorisation(alice.name, MachineId("m1"), free.token_id or TokenId(""), "127.0.0.1:1")
            await management.call("PUT", f"/v1/vcms/{new_vcm_id()}", order)
        with pytest.raises((CertificateRevoked, KmcUnavailable)):
            await alice.plug_in()
        with pytest.raises((CertificateRevoked, KmcUnavailable)):
            await alice.application()
        await assert_off(world, vcm)
    found = await (await world.operator()).call("GET", "/v1/consumers", reply=ConsumerList)
    assert [(c.name, c.state) for c in found.consumers] == [("alice", "revoked")]
    assert [line for line in await world.audit_lines("alice") if line[0] == "ukey-revoked"] == [("ukey-revoked", "ok")]


@pytest.mark.parametrize("what", ["ukey", "vcm"])
async def test_it_is_off_before_the_disk_is_asked(world: World, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """However busy the database is: nothing is served meanwhile."""
    alice, terminal, vcm = await serving(world)
    asked, free = asyncio.Event(), asyncio.Event()
    read, write = world.database.read, world.database.write

    async def busy_read(*work: Any) -> Any:
        asked.set()
        await free.wait()
        return await read(*work)

    async def busy_write(*work: Any) -> Any:
        asked.set()
        await free.wait()
        return await write(*work)

    monkeypatch.setattr(world.database, "read", busy_read)
    monkeypatch.setattr(world.database, "write", busy_write)
    revoke = world.kmc.service.revoke
    revoking = asyncio.create_task(revoke.ukey(alice.name, actor="o") if what == "ukey" else revoke.vcm(vcm.id, "gone", actor="o"))
    await asked.wait()
    assert isinstance((await vcm.channel.closed())[-1], Revoked)
    if what == "ukey":
        assert isinstance((await terminal.closed())[-1], TerminalRefused)
    assert not revoking.done()
    free.set()
    await revoking


async def test_a_stolen_ukey_is_revoked_once_and_for_good(world: World) -> None:
    alice = await world.enrol()
    operator = await world.operator()
    for _ in range(2):
        await operator.call("POST", "/v1/consumers/alice/revoke-ukey")
    assert [event for event, _ in await world.audit_lines("alice")].count("ukey-revoked") == 1
    with pytest.raises(ConsumerRevoked):
        await operator.call("POST", "/v1/consumers", alice.request(), reply=EnrolReply)
    with pytest.raises(StateConflict):
        await operator.call("DELETE", "/v1/consumers/alice")
    with pytest.raises(ConsumerUnknown):
        await operator.call("POST", "/v1/consumers/nobody/revoke-ukey")
    await world.enrol("bob", confirm=False)
    with pytest.raises(StateConflict):
        await operator.call("POST", "/v1/consumers/bob/revoke-ukey")
    await (await world.enrol("carol")).plug_in()  # others go on


async def test_a_revoked_ukeys_certificate_alone_is_not_enough(world: World) -> None:
    """Were its certificate still good, the consumer's state would refuse it."""
    alice = await world.enrol()
    await world.database.write(lambda connection: store.revoke_consumer(connection, alice.name))
    with pytest.raises(ConsumerRevoked):
        await alice.application()
    terminal = await alice.plug_in()
    assert [getattr(frame, "code", "") for frame in await terminal.closed()] == [ConsumerRevoked.code]


async def test_a_certificate_that_has_expired(world: World) -> None:
    _, _, vcm = await serving(world)
    world.clock.ahead = FAST.vcm_certificate_s + 1
    with pytest.raises(CertificateExpired):
        await vcm.caller.call("GET", "/v1/escrow", reply=LogPage)


async def test_an_expired_vcm_certificate_fails_in_the_handshake(tmp_path: Path) -> None:
    async with world_in(tmp_path, structs.replace(FAST, vcm_certificate_s=30.0)) as world:
        alice = await world.enrol()
        machine, management = await world.machine(), await world.management()
        for ahead, expired in ((0.0, False), (-60.0, True)):
            world.clock.ahead = ahead
            vcm = TestVcm(world, alice)
            await vcm.put_card(machine)
            await vcm.authorise(management)
            await vcm.certify(machine)
            credentials = Credentials(key_to_pem(vcm.key), vcm.chain.chain, alice.reply.root)
            assert await refused_in_handshake(world.url, credentials) is expired


async def test_a_renewed_certificate(world: World) -> None:
    alice, terminal, vcm = await serving(world)
    session = world.kmc.service._sessions.get(alice.name)
    assert session is not None
    session.vcms[vcm.id].certified_until = 0
    request = CertificateRequest(make_request(vcm.key, Identity(Role.VCM, "someone-else", alice.name)), ("8.8.8.8",))
    chain = await vcm.caller.call("POST", "/v1/certificate", request, reply=Chain)
    await vcm.heartbeat(terminal)
    newer = vcm.call_with(chain)
    await newer.call("GET", "/v1/escrow", reply=LogPage)
    await vcm.caller.call("GET", "/v1/escrow", reply=LogPage)  # the older one has its time
    await world.kmc.service.revoke.vcm(vcm.id, "test", actor="test")
    for caller in (newer, vcm.caller):
        with pytest.raises((CertificateRevoked, KmcUnavailable)):
            await caller.call("GET", "/v1/escrow", reply=LogPage)


async def test_certificates_of_a_vcm_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, vcm = await serving(world)
    monkeypatch.setattr(identity, "MAX_CERTIFICATES", 2)
    request = CertificateRequest(vcm.certificate_request().csr)
    attempts = [vcm.caller.call("POST", "/v1/certificate", request, reply=Chain) for _ in range(4)]
    done = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(one, Chain) for one in done) == 1
    assert sum(isinstance(one, LimitReached) for one in done) == 3


async def test_expired_certificates_are_forgotten(world: World) -> None:
    alice, _, vcm = await serving(world)
    now = world.clock()

    async def kept() -> int:
        return len(await world.database.read(lambda connection: store.read_certificates(connection, 0)))

    before = await kept()
    await world.center.forget_expired(now + FAST.vcm_certificate_s + 3601)
    assert world.center.registry.serials(Role.VCM, alice.name) == ()
    with pytest.raises(CertificateInvalid):
        await vcm.caller.call("GET", "/v1/escrow", reply=LogPage)
    assert await kept() == before  # in the table for a while longer
    await world.center.forget_expired(now + 31 * 86400)
    assert await kept() == before - 1


async def test_a_certificate_that_the_table_does_not_know(world: World) -> None:
    """A CA's key alone makes no valid certificate."""
    alice, _, vcm = await serving(world)
    key = subject_key(make_request(vcm.key, Identity(Role.VCM, vcm.id, alice.name)), Role.VCM)
    unrecorded = await world.center.certification.issue(Identity(Role.VCM, vcm.id, alice.name), key, not_after=time.time() + 60)
    with pytest.raises(CertificateInvalid):
        await vcm.call_with(world.center.certification.chain(unrecorded)).call("GET", "/v1/escrow", reply=LogPage)


async def test_no_signal_after_the_last_word(world: World) -> None:
    _, terminal, vcm = await serving(world)
    await terminal.send(UkeyRemoved())
    frames = await terminal.closed()
    assert not [frame for frame in frames if isinstance(frame, DownloadSignal | LeaseRequested)]
    with pytest.raises((CertificateRevoked, KmcUnavailable)):
        await vcm.join()
