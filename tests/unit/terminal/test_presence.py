"""The Ukey goes and comes back, and so do the servers."""

import asyncio
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from cipherfleet.contract.errors import AlreadyRunning, KmcUnavailable, PinWrong, StateNotWritable, UkeyAbsent, UkeyInvalid
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.kmc_api import LeaseRequested, UkeyRemoved
from cipherfleet.contract.management_api import IdentityWanted, Inserted, LoggedIn, LoginFailed, LoginPermit, Removed, ServiceOn
from cipherfleet.contract.statements import Purpose
from cipherfleet.terminal.process import TerminalConfig
from tests.pki import Authority
from tests.unit.terminal.platform import ACME, PATIENCE_S, PIN, Platform
from tests.unit.terminal.running import Running


def pull(platform: Platform) -> Path:
    pocket = platform.ukey.with_name("pocket")
    platform.ukey.rename(pocket)
    return pocket


async def test_a_pulled_ukey_says_so_at_once_and_signs_nothing_more(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    kmc, management = enrolled.kmc.line, enrolled.management.line
    pull(enrolled)
    # A request that arrives before the removal was noticed is not signed either.
    await kmc.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16)))
    await management.say(IdentityWanted(os.urandom(32), Purpose.BUILD_VCM))
    await kmc.hears(UkeyRemoved)
    await management.hears(Removed)
    await terminal.tells("removed")
    assert kmc.sent.empty()
    assert management.sent.empty()
    for line in (kmc, management):
        await asyncio.wait_for(line.closed.wait(), PATIENCE_S)


@pytest.mark.parametrize("how", ["removed", "renamed", "another"])
async def test_every_way_of_pulling_it(enrolled: Platform, terminal: Running, how: str) -> None:
    await enrolled.management.line.hears(Inserted)
    if how == "removed":
        shutil.rmtree(enrolled.ukey)
    elif how == "renamed":
        pull(enrolled)
    else:  # another stick in the same slot
        record = enrolled.ukey / "ukey.json"
        record.write_bytes(record.read_bytes().replace(b"ukey-acme0001", b"ukey-ffff0001"))
    await enrolled.management.line.hears(Removed)


async def test_the_ukey_back_the_service_is_on_again(enrolled: Platform, terminal: Running) -> None:
    for _ in range(2):
        await enrolled.create()
        pocket = pull(enrolled)
        await enrolled.kmc.line.hears(UkeyRemoved)
        await enrolled.management.line.hears(Removed)
        pocket.rename(enrolled.ukey)
    await enrolled.create()
    await terminal.tells("service-on", times=3)


async def test_another_ukey_in_its_place_does_not_count(enrolled: Platform, terminal: Running, tmp_path: Path) -> None:
    await enrolled.management.line.hears(Inserted)
    shutil.rmtree(enrolled.ukey)
    await enrolled.management.line.hears(Removed)
    enrolled.kmc.consumers.clear()
    await enrolled.enrol(consumer=ACME, folder=tmp_path / "second")
    other = tmp_path / "second" / "ukey.json"
    other.write_bytes(other.read_bytes().replace(b"ukey-acme0001", b"ukey-ffff0001"))
    (tmp_path / "second").rename(enrolled.ukey)
    with pytest.raises(TimeoutError):
        await enrolled.management.line.hears(Inserted, within=0.5)


async def test_a_ukey_that_comes_back_piece_by_piece(enrolled: Platform, terminal: Running) -> None:
    await enrolled.create()
    pocket = pull(enrolled)
    await enrolled.management.line.hears(Removed)
    enrolled.ukey.mkdir()
    for name in ("ukey.json", "checkpoint.json", "cmk.bin"):
        shutil.copy(pocket / name, enrolled.ukey / name)
    await asyncio.sleep(0.25)  # longer than the watch: it was seen, and could not be opened yet
    assert not terminal.task.done()
    shutil.copy(pocket / "secrets.sealed", enrolled.ukey / "secrets.sealed")
    await enrolled.management.line.hears(Inserted)


async def test_a_ukey_that_comes_back_damaged_ends_the_terminal(
    enrolled: Platform, terminal: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cipherfleet.terminal.process._REOPEN_ATTEMPTS", 2)
    await enrolled.management.line.hears(Inserted)
    pocket = pull(enrolled)
    await enrolled.management.line.hears(Removed)
    (pocket / "secrets.sealed").write_bytes(b"")
    pocket.rename(enrolled.ukey)
    with pytest.raises(UkeyInvalid):
        await terminal.ends()


async def test_stopped_while_the_ukey_is_away(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    pull(enrolled)
    await terminal.tells("removed")
    terminal.stop.set()
    await terminal.ends()


async def test_stopping_turns_the_service_off(enrolled: Platform, terminal: Running) -> None:
    await enrolled.create()
    terminal.stop.set()
    await enrolled.kmc.line.hears(UkeyRemoved)
    await enrolled.management.line.hears(Removed)
    await terminal.ends()


async def test_a_pin_that_is_not_kept(enrolled: Platform) -> None:
    async with Running(enrolled, keep_pin=False) as terminal:
        await enrolled.management.line.hears(Inserted)
        pull(enrolled)
        with pytest.raises(UkeyAbsent):
            await terminal.ends()
        assert terminal.terminal._pin == bytearray(len(PIN)), "wiped"


# -- servers come and go -----------------------------------------------------------------------------------------------


async def test_management_restarted_the_serving_vcm_is_taken_over(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    await enrolled.stop("management")
    await terminal.tells("management-lost")
    await enrolled.lease(vcm)  # the service does not depend on it
    await enrolled.start("management")
    await enrolled.management.line.hears(Inserted)
    logins = len(vcm.logins)
    await enrolled.management.line.say(LoginPermit(vcm.id, vcm.endpoint, b""))
    await enrolled.management.line.hears(LoggedIn)
    assert len(vcm.logins) == logins + 1, "it really logged in again"
    await enrolled.management.line.say(ServiceOn(vcm.id, (), vcm.endpoint))
    await enrolled.lease(vcm)
    assert terminal.steps().count("service-on") == 1


async def test_kmc_restarted_leases_go_on(enrolled: Platform, terminal: Running) -> None:
    enrolled.kmc.grow(2)
    vcm = await enrolled.create()
    await enrolled.stop("kmc")
    await terminal.tells("kmc-lost")
    await enrolled.start("kmc")
    await terminal.tells("kmc-connected", times=2)
    await enrolled.lease(vcm)
    assert enrolled.kmc.line.queries == ["since=2", "since=2"]


async def test_both_restarted_in_the_middle_of_a_creation(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    vcm = await enrolled.vcm()
    await enrolled.permit(vcm)
    await terminal.tells("login-permit")
    await enrolled.stop("kmc", "management")
    await enrolled.start()
    await enrolled.create()
    await terminal.on


async def test_a_permit_of_a_lost_creation_is_worth_nothing(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    await enrolled.stop("management")
    await enrolled.start("management")
    await enrolled.management.line.hears(Inserted)
    await enrolled.permit(await enrolled.vcm())
    await terminal.tells("out-of-order")


async def test_a_new_terminal_takes_over_what_serves(enrolled: Platform) -> None:
    async with Running(enrolled) as first:
        vcm = await enrolled.create()
        first.task.cancel()  # killed: no goodbye is meant here
        await asyncio.wait({first.task})
    async with Running(enrolled) as second:
        await enrolled.management.line.hears_at_last(Inserted)
        await enrolled.kmc.line.hears_at_last(UkeyRemoved)
        await enrolled.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16)))
        await second.tells("lease-refused")  # not before the card has confirmed
        await enrolled.management.line.say(LoginPermit(vcm.id, vcm.endpoint, b""))
        await enrolled.management.line.hears(LoggedIn)
        await enrolled.management.line.say(ServiceOn(vcm.id, (), vcm.endpoint))
        await enrolled.lease(vcm)
        assert (await second.on).vcm == vcm.id


async def test_what_is_taken_over_gets_no_cmk(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    vcm = await enrolled.vcm()
    vcm.share, vcm.serving = os.urandom(32), True
    await enrolled.management.line.say(LoginPermit(vcm.id, vcm.endpoint, b""))
    failed = await enrolled.management.line.hears(LoginFailed)
    assert (failed.vcm, failed.code) == (vcm.id, "card-unconfirmed")
    await enrolled.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, os.urandom(16)))
    await terminal.tells("lease-refused")


async def test_a_signal_for_what_is_taken_over_is_refused(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    vcm = await enrolled.vcm()
    await enrolled.management.line.say(LoginPermit(vcm.id, vcm.endpoint, b""))
    await terminal.tells("login-permit")
    await enrolled.signal(vcm)
    refused = await terminal.tells("release-refused")
    assert refused.detail == "mark-mismatch"


async def test_no_platform(enrolled: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cipherfleet.terminal.link.PATIENCE_S", 0.2)
    await enrolled.stop("kmc", "management")
    async with Running(enrolled) as terminal:
        with pytest.raises(KmcUnavailable):
            await terminal.ends()


async def test_a_platform_that_is_not_ours(enrolled: Platform) -> None:
    await enrolled.stop("kmc")
    enrolled.credentials["kmc"] = Authority("root").subordinate("platform").credentials(Identity(Role.KMC, "kmc"))
    await enrolled.start("kmc")
    async with Running(enrolled) as terminal:
        with pytest.raises(Exception, match="handshake was refused"):
            await terminal.ends()


async def test_a_kmc_that_goes_before_it_gets_the_cmk(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    vcm = await enrolled.vcm()
    await enrolled.signal(vcm)
    await terminal.tells("download-signal")
    await enrolled.identify()
    await enrolled.stop("kmc")
    await terminal.tells("kmc-lost")
    await enrolled.permit(vcm)
    failed = await enrolled.management.line.hears(LoginFailed)
    assert failed.code == KmcUnavailable.code


# -- one terminal per consumer -----------------------------------------------------------------------------------------


async def test_a_second_terminal_of_the_same_consumer(enrolled: Platform, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    async with Running(enrolled, run_folder=run):
        await enrolled.management.line.hears(Inserted)
        entry = msgspec.json.decode((run / "terminal-acme.json").read_bytes())
        assert (entry["role"], entry["consumer"], entry["pid"]) == ("terminal", "acme", os.getpid())
        async with Running(enrolled, run_folder=run) as second:
            with pytest.raises(AlreadyRunning):
                await second.ends()
        assert (run / "terminal-acme.json").exists()
    assert not (run / "terminal-acme.json").exists()
    async with Running(enrolled, run_folder=run):
        await enrolled.management.line.hears_at_last(Inserted)


async def test_a_run_folder_that_is_not_there(enrolled: Platform, tmp_path: Path) -> None:
    async with Running(enrolled, run_folder=tmp_path / "none") as terminal:
        with pytest.raises(StateNotWritable):
            await terminal.ends()


async def test_a_wrong_pin(enrolled: Platform) -> None:
    async with Running(enrolled, pin="9999-wrong") as terminal:
        with pytest.raises(PinWrong):
            await terminal.ends()
    assert enrolled.kmc.line.connections == 0


async def test_no_ukey(platform: Platform) -> None:
    async with Running(platform) as terminal:
        with pytest.raises(UkeyAbsent):
            await terminal.ends()


def test_the_configuration_does_not_show_the_pin() -> None:
    assert PIN not in repr(TerminalConfig("/ukey", PIN))
