"""A VCM's life in this process: CMK, leases, keys, callers, and every way to end."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cipherfleet.channel import codec
from cipherfleet.computing.vcm import Ending
from cipherfleet.computing.vcm_boot import News
from cipherfleet.contract.audit import AuditQuery
from cipherfleet.contract.errors import (
    ApplicationRevoked,
    CertificateInvalid,
    CertificateRevoked,
    CipherfleetError,
    LeaseExpired,
    LoginRefused,
    NotPermitted,
    ServiceOff,
    ServiceUnavailable,
    TokenStale,
)
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import Serial
from cipherfleet.contract.kmc_api import CertificatesRevoked, CmkDelivered, EscrowChanged, LeaseGranted
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.messages import Done
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import CardDescription, Operation
from cipherfleet.contract.vcm import VcmHost
from cipherfleet.contract.vcm_api import LoginReply
from tests.unit.computing.machine.fake_kmc import EPOCH, FakeKmc, serial
from tests.unit.computing.machine.stage import RunningVcm, vcm_of


async def serving(vcm: RunningVcm) -> None:
    assert await vcm.news() == News(VcmState.SERVING)


async def refused(vcm: RunningVcm) -> None:
    """Nobody listens any more."""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*vcm.address)


async def test_from_certificate_to_service(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        await kmc.until("Serving")
        async with vcm.caller() as client:
            await client.call("GET", "/v1/authorise")
        host: VcmHost = vcm.host
        assert (host.id, host.consumer) == (vcm.id, "acme")
        assert list(await host.endpoints()) == [f"https://{vcm.address[0]}:{vcm.address[1]}"]
        assert (await host.audit(AuditQuery())).entries[0].consumer == "acme"
        made = await host.keys.create("AES-256-GCM", label="", actor="a")
        assert (await host.keys.use(made.id)).version == 1
    assert await vcm.task == Ending("", "it was told to")
    assert await vcm.news() == News(VcmState.DELETED, ": it was told to")
    await refused(vcm)


async def test_the_terminal_logs_in_and_may_do_nothing_else(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        async with vcm.caller_of(vcm.consumer.terminal()) as terminal:
            reply = await terminal.call("POST", "/v1/login", vcm.consumer.login(vcm.id), reply=LoginReply)
            assert (reply.vcm, reply.card, len(reply.confirmation)) == (vcm.id, vcm.card.card.id, 32)
            assert 0 < reply.lease_s <= 6
            with pytest.raises(NotPermitted):
                await terminal.call("GET", "/v1/authorise")
        async with vcm.caller() as client:
            with pytest.raises(NotPermitted):
                await client.call("POST", "/v1/login", vcm.consumer.login(vcm.id), reply=LoginReply)


async def test_until_there_is_a_lease_service_is_off(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.plugged_in = False
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await kmc.until("LeaseWanted")
        async with vcm.caller() as client, vcm.caller_of(vcm.consumer.terminal()) as terminal:
            with pytest.raises(ServiceOff):
                await client.call("GET", "/v1/authorise")
            with pytest.raises(ServiceOff):
                await terminal.call("POST", "/v1/login", vcm.consumer.login(vcm.id), reply=LoginReply)
            kmc.plugged_in = True
            await serving(vcm)
            await client.call("GET", "/v1/authorise")


async def test_leases_are_renewed_every_heartbeat_and_the_first_is_wanted_at_once(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.lease_ms = 400
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.1) as vcm:
        await serving(vcm)
        await kmc.until("LeaseWanted", 8)
        assert not vcm.task.done()


async def test_without_a_new_lease_everything_is_closed_when_the_old_one_ends(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.lease_ms = 500
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.1) as vcm:
        await serving(vcm)
        async with vcm.caller() as client:
            hanging = asyncio.create_task(client.call("GET", "/v1/hang", reply=Done))
            await client.call("GET", "/v1/authorise")
            kmc.plugged_in = False
            ending = await vcm.ending()
            assert ending.code == "lease-expired"
            with pytest.raises(CipherfleetError):
                await hanging
        await refused(vcm)
        assert await vcm.news() == News(VcmState.FAILED, "lease-expired: " + ending.message)


async def test_without_the_kmc_the_lease_still_ends(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.lease_ms = 500
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.1) as vcm:
        await serving(vcm)
        await kmc.stop()
        assert (await vcm.ending()).code == "lease-expired"


async def test_after_the_kmc_came_back_service_goes_on(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.1) as vcm:
        await kmc.until("Serving")
        await kmc.stop()
        kmc.first_revoked = (Serial("abc"),)
        vcm.consumer.application("late")  # while nobody could tell
        seen = dict(kmc.seen)
        await kmc.restart()
        await kmc.until("Serving", seen["Serving"] + 1)
        await kmc.until("CmkLoaded", seen["CmkLoaded"] + 1)
        await kmc.until("LeaseWanted", seen["LeaseWanted"] + 2)
        await kmc.until("GET /v1/escrow", seen["GET /v1/escrow"] + 1)
        assert not vcm.task.done()


async def test_revoked_ends_it_at_once(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        async with vcm.caller() as client:
            await client.call("GET", "/v1/authorise")
            hanging = asyncio.create_task(client.call("GET", "/v1/hang", reply=Done))
            await asyncio.sleep(0)
            await kmc.revoke(vcm.id)
            assert await vcm.ending() == Ending("service-off", "ukey-removed")  # at once: a lease's end would say so
            with pytest.raises(CipherfleetError):
                await hanging
        await refused(vcm)
        with pytest.raises(ServiceOff):
            await vcm.host.authorise(None, Right.SHOW)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["revoked", "told", "lease"])
async def test_its_last_words_are_the_uses_that_it_had_not_told(tmp_path: Path, kmc: FakeKmc, how: str) -> None:
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await serving(vcm)
        async with vcm.caller() as client:
            await client.call("GET", "/v1/authorise")
        peer = SimpleNamespace(identity=Identity(Role.APPLICATION, "billing", vcm.consumer.name))
        for _ in range(3):
            vcm.host.note_use(peer, "encrypt", "0" * 32, 1, "ok")  # type: ignore[arg-type]
        match how:
            case "revoked":
                await kmc.revoke(vcm.id)
            case "told":
                vcm.stop.set()
            case "lease":
                kmc.plugged_in = False
        await vcm.ending()
        await kmc.until("LastUses")
        (report,) = kmc.last_uses
        assert [(use.application, use.operation, use.outcome, use.count) for use in report.recorded] == [("billing", "encrypt", "ok", 3)]
        await refused(vcm)


async def test_when_the_card_is_gone_so_is_the_vcm(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await serving(vcm)
        vcm.card.server.detach(vcm.id)
        assert (await vcm.ending()).code == "card-unavailable"


async def test_when_the_card_says_that_the_lease_ended_it_is_believed(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.lease_ms = 300
    async with vcm_of(kmc, tmp_path, heartbeat_s=60) as vcm:
        await serving(vcm)
        vcm.host.__dict__["remaining"] = lambda: 60.0
        await asyncio.sleep(0.35)
        with pytest.raises((LeaseExpired, ServiceUnavailable)):
            await vcm.host.card.submit(Operation.CONFIRM, data=bytes(32))
        assert (await vcm.ending()).code == "lease-expired"


async def test_when_its_machine_is_gone_so_is_the_vcm(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        vcm.boot.close()
        assert (await vcm.ending()).code == "machine-unavailable"


async def test_what_the_kmc_refuses_to_certify_does_not_start(tmp_path: Path, kmc: FakeKmc) -> None:
    with pytest.raises(TokenStale):
        async with vcm_of(kmc, tmp_path, refuse=TokenStale("used").to_reply().error):
            pass


async def test_a_revoked_application_is_cut_off(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        credentials = vcm.consumer.application("billing")
        async with vcm.caller_of(credentials) as client:
            await client.call("GET", "/v1/authorise")
            hanging = asyncio.create_task(client.call("GET", "/v1/hang", reply=Done))
            await client.call("GET", "/v1/authorise")
            await kmc.tell(vcm.id, CertificatesRevoked((serial(credentials),)))
            with pytest.raises(CipherfleetError):
                await hanging
            with pytest.raises(CertificateRevoked):
                await client.call("GET", "/v1/authorise")


async def test_another_consumers_application_fails_in_the_handshake(tmp_path: Path, kmc: FakeKmc) -> None:
    rival = kmc.consumer("rival")
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        foreign = rival.domain.credentials(Identity(Role.APPLICATION, "spy", rival.name), trust=vcm.consumer.domain.pem)
        async with vcm.caller_of(foreign) as spy:
            with pytest.raises((CertificateInvalid, ServiceUnavailable)):
                await spy.call("GET", "/v1/authorise")
        platform = kmc.platform.credentials(Identity(Role.OPERATOR, "operator"), trust=vcm.consumer.domain.pem)
        async with vcm.caller_of(platform) as operator:
            with pytest.raises((CertificateInvalid, ServiceUnavailable)):
                await operator.call("GET", "/v1/authorise")
        neighbour = vcm.consumer.domain.credentials(
            Identity(Role.VCM, "vcm-000000000000", vcm.consumer.name), trust=vcm.consumer.domain.pem
        )
        async with vcm.caller_of(neighbour) as other:
            with pytest.raises(NotPermitted):
                await other.call("GET", "/v1/authorise")


async def test_a_change_of_the_escrow_is_fetched(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        async with vcm.caller() as client:
            await client.call("GET", "/v1/authorise")
            statement = vcm.consumer.statement("billing", b"x" * 32, revoked=True)
            vcm.consumer.keep("billing", statement)
            await kmc.tell(vcm.id, EscrowChanged(len(vcm.consumer.log)))
            async with asyncio.timeout(20):
                with pytest.raises(ApplicationRevoked):
                    while True:
                        await client.call("GET", "/v1/authorise")


async def test_an_old_view_is_not_served_once_the_ukey_has_seen_more(tmp_path: Path, kmc: FakeKmc) -> None:
    """The KMC tells the VCM nothing of a signing out; the next lease does."""
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await serving(vcm)
        async with vcm.caller() as client:
            await client.call("GET", "/v1/authorise")
            vcm.consumer.keep("billing", vcm.consumer.statement("billing", bytes(32), (), revoked=True))
            async with asyncio.timeout(20):
                with pytest.raises(ApplicationRevoked):
                    while True:
                        await client.call("GET", "/v1/authorise")


async def test_a_log_without_what_the_ukey_saw_ends_service(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await serving(vcm)
        vcm.consumer.remembered = Seen(EPOCH, len(vcm.consumer.log) + 1, b"x" * 32)
        assert (await vcm.ending()).code == "escrow-rolled-back"


async def test_another_history_than_the_ukey_saw_ends_service(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await serving(vcm)
        vcm.consumer.remembered = Seen(EPOCH, 0, b"x" * 32)
        assert (await vcm.ending()).code == "escrow-rolled-back"


async def test_an_escrow_that_was_set_back_does_not_serve(tmp_path: Path, kmc: FakeKmc) -> None:
    owner = kmc.consumer("acme")
    owner.application("billing")
    kmc.plugged_in = False
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await kmc.until("CmkLoaded")  # the Ukey's seal says how far the log was
        owner.log.clear()
        owner.statements.clear()
        kmc.plugged_in = True
        ending = await vcm.ending()
        assert ending.code == "escrow-rolled-back"
        await kmc.until("CmkRefused")
        assert kmc.refused == ["escrow-rolled-back"]


async def test_a_cmk_that_does_not_open_is_refused_and_a_good_one_taken(
    tmp_path: Path, kmc: FakeKmc, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = kmc.consumer("acme")
    good = owner.delivery
    monkeypatch.setattr(owner, "delivery", lambda *_: CmkDelivered(bytes(384), bytes(100)))
    async with vcm_of(kmc, tmp_path) as vcm:
        await kmc.until("CmkRefused")
        assert kmc.refused == ["cmk-invalid"]
        await kmc.tell(vcm.id, good(vcm.card.card.id, vcm.id, *kmc.cards[vcm.card.card.id]))
        await serving(vcm)


async def test_a_lease_that_was_not_asked_for_buys_nothing(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.plugged_in = False
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.05) as vcm:
        await kmc.until("LeaseWanted")
        await kmc.tell(vcm.id, LeaseGranted(vcm.consumer.lease(vcm.card.card.id, vcm.id, bytes(16), 6000)))
        await kmc.until("LeaseWanted", 4)
        done = await vcm.host.card.submit(Operation.DESCRIBE)
        assert not codec.decode(done.parameters, CardDescription).serving


async def test_its_certificate_is_renewed_at_half_its_life(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.vcm_certificate_s = 2.0
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        await kmc.until("renewal", 2)
        async with vcm.caller() as client:
            await client.call("GET", "/v1/authorise")


async def test_a_renewal_that_fails_is_tried_again(tmp_path: Path, kmc: FakeKmc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cipherfleet.computing.vcm_process.RETRY_S", 0.05)
    kmc.vcm_certificate_s = 3.0
    async with vcm_of(kmc, tmp_path, heartbeat_s=0.1) as vcm:
        await serving(vcm)
        await kmc.stop()
        await asyncio.sleep(1.6)
        await kmc.restart()
        await kmc.until("renewal")
        assert not vcm.task.done()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_when_the_wall_clock_jumps_its_certificate_is_renewed(
    tmp_path: Path, kmc: FakeKmc, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    kmc.vcm_certificate_s = 86400.0
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        monkeypatch.setattr("cipherfleet.computing.vcm_process.time", SimpleNamespace(time=lambda: time.time() + jump))
        await kmc.until("renewal", within=3.0)
        await asyncio.sleep(1.5)  # longer than it takes to look again
        assert kmc.seen["renewal"] == 1


async def test_a_vcm_whose_certificate_is_past_renewal_makes_room_for_another(tmp_path: Path, kmc: FakeKmc) -> None:
    kmc.vcm_certificate_s = 2.0
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        await kmc.stop()
        assert (await vcm.ending()).code == "certificate-expired"


async def test_a_login_with_a_foreign_statement_is_refused(tmp_path: Path, kmc: FakeKmc) -> None:
    async with vcm_of(kmc, tmp_path) as vcm:
        await serving(vcm)
        async with vcm.caller_of(vcm.consumer.terminal()) as terminal:
            with pytest.raises(LoginRefused):
                await terminal.call("POST", "/v1/login", vcm.consumer.statement("x", b"x" * 32), reply=LoginReply)
