"""Enrolling: a consumer with a Ukey, or nothing at all."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import (
    CertificateInvalid,
    CheckpointForged,
    CipherfleetError,
    DiskFull,
    Exists,
    FileProblem,
    HsmUnavailable,
    KmcUnavailable,
    Malformed,
    ManagementUnavailable,
    NotPermitted,
    PinWrong,
    StateConflict,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.kmc_api import EnrolReply
from cipherfleet.contract.messages import Chain
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.pki import Authority
from tests.unit.terminal.platform import ACME, PIN, Platform
from tests.unit.terminal.test_ukey import no_file_larger_than


def nothing_is_left(platform: Platform) -> bool:
    beside = [path.name for path in platform.ukey.parent.iterdir()]
    return platform.kmc.consumers == {} and platform.management.domains == set() and beside == []


async def test_a_consumer_is_enrolled(platform: Platform) -> None:
    result = await platform.enrol()
    assert (result.consumer, result.serial, result.ukey) == (ACME, "ukey-acme0001", str(platform.ukey))
    assert result.subnet == "127.16.2.0/24"
    assert platform.kmc.consumers == {ACME: "enrolled"}
    assert platform.management.domains == {ACME}
    with DirectoryUkey.open(platform.ukey, PIN) as ukey:
        assert ukey.record.kmc_url == platform.kmc.url
        assert ukey.record.management_url == platform.management.url
        assert ukey.memory.seen == platform.kmc.point()
        assert await ukey.ciphertext_cmk() == platform.kmc.ciphertext_cmk
    assert "2468" not in repr(result)


async def test_every_ukey_has_a_share_of_its_own(platform: Platform, tmp_path: Path) -> None:
    shares = set()
    for name in ("acme", "globex"):
        await platform.enrol(consumer=ConsumerId(name), folder=tmp_path / name)
        with DirectoryUkey.open(tmp_path / name, PIN) as ukey:
            shares.add(bytes(ukey._unlocked().share))
    assert len(shares) == 2
    assert bytes(32) not in shares


async def test_a_name_that_is_taken_stays_with_its_owner(platform: Platform, tmp_path: Path) -> None:
    await platform.enrol()
    with pytest.raises(Exists):
        await platform.enrol(folder=tmp_path / "second")
    assert platform.kmc.consumers == {ACME: "enrolled"}
    assert platform.management.domains == {ACME}
    assert not (tmp_path / "second").exists()


async def test_a_name_that_is_pending_elsewhere_stays_pending(platform: Platform) -> None:
    platform.kmc.consumers[ACME] = "pending"
    with pytest.raises(Exists):
        await platform.enrol()
    assert platform.kmc.consumers == {ACME: "pending"}


async def test_a_folder_in_use_is_noticed_first(platform: Platform) -> None:
    platform.ukey.mkdir()
    (platform.ukey / "diary.txt").write_text("mine")
    with pytest.raises(Exists):
        await platform.enrol()
    assert (platform.ukey / "diary.txt").read_text() == "mine"
    assert platform.kmc.consumers == {}


@pytest.mark.parametrize("pin", ["", "123", "x" * 65])
async def test_a_bad_pin_is_noticed_first(platform: Platform, pin: str) -> None:
    with pytest.raises(PinWrong):
        await platform.enrol(pin=pin)
    assert nothing_is_left(platform)


@pytest.mark.parametrize("name", ["", "Acme", "-", "a/b", "x" * 33])
async def test_a_bad_name_is_noticed_first(platform: Platform, name: str) -> None:
    with pytest.raises(Malformed):
        await platform.enrol(consumer=ConsumerId(name))
    assert nothing_is_left(platform)


async def test_no_place_for_the_ukey(platform: Platform, tmp_path: Path) -> None:
    with pytest.raises(FileProblem):
        await platform.enrol(folder=tmp_path / "none" / "ukey")
    assert nothing_is_left(platform)


async def test_disk_full(platform: Platform) -> None:
    with pytest.raises(DiskFull), no_file_larger_than(3000):  # credentials fit, ukey.json does not
        await platform.enrol()
    assert nothing_is_left(platform)
    await platform.enrol()


@pytest.mark.parametrize("error", [HsmUnavailable("away"), NotPermitted("no")])
async def test_the_kmc_fails(platform: Platform, error: CipherfleetError) -> None:
    platform.kmc.fail["enrol"] = [error]
    with pytest.raises(type(error)):
        await platform.enrol()
    assert nothing_is_left(platform)


async def test_management_fails(platform: Platform) -> None:
    platform.management.fail["allot"] = ManagementUnavailable("away")
    with pytest.raises(ManagementUnavailable):
        await platform.enrol()
    assert nothing_is_left(platform)


async def test_management_is_not_there(platform: Platform) -> None:
    await platform.stop("management")
    with pytest.raises(ManagementUnavailable):
        await platform.enrol()
    assert platform.kmc.consumers == {}


async def test_nobody_is_there(platform: Platform) -> None:
    await platform.stop("kmc", "management")
    with pytest.raises(KmcUnavailable):
        await platform.enrol()


async def test_the_confirmation_is_refused(platform: Platform) -> None:
    platform.kmc.fail["confirm"] = [StateConflict("no")]
    with pytest.raises(StateConflict):
        await platform.enrol()
    assert nothing_is_left(platform)


async def test_another_enrolment_of_the_name_came_between(platform: Platform) -> None:
    """The other one keeps consumer and domain; only the Ukey goes."""
    platform.kmc.fail["confirm"] = [Exists("another enrolment")]
    with pytest.raises(Exists):
        await platform.enrol()
    assert platform.kmc.consumers == {ACME: "pending"}
    assert platform.management.domains == {ACME}
    assert not platform.ukey.exists()


async def test_the_confirmation_never_arrives(platform: Platform) -> None:
    platform.kmc.fail["confirm"] = [HsmUnavailable("away")] * 3
    with pytest.raises(HsmUnavailable):
        await platform.enrol()
    assert nothing_is_left(platform)


async def test_the_confirmation_arrives_at_the_second_try(platform: Platform) -> None:
    platform.kmc.fail["confirm"] = [HsmUnavailable("away")]
    await platform.enrol()
    assert platform.kmc.consumers == {ACME: "enrolled"}


async def test_the_confirmations_answer_gets_lost(platform: Platform) -> None:
    platform.kmc.fail["confirm"] = [HsmUnavailable("away", "after")]
    await platform.enrol()
    assert platform.kmc.consumers == {ACME: "enrolled"}
    DirectoryUkey.open(platform.ukey, PIN).close()


async def test_cancelled_in_the_middle(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = asyncio.Event()

    async def hang(*_: object) -> object:
        arrived.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(platform.management, "_allot", hang)
    await platform.stop("management")
    await platform.start("management")
    enrolling = asyncio.create_task(platform.enrol())
    await asyncio.wait_for(arrived.wait(), 5)
    enrolling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await enrolling
    assert nothing_is_left(platform)


Forgery = Callable[[Platform, EnrolReply], EnrolReply]


def _another_key(platform: Platform, reply: EnrolReply) -> EnrolReply:
    chain = platform.kmc.domain(ACME).certify(Identity(Role.UKEY, "ukey-acme0001", ACME), new_key().public_key())
    return msgspec.structs.replace(reply, identity=Chain(chain, platform.root.pem))


def _swapped(platform: Platform, reply: EnrolReply) -> EnrolReply:
    return msgspec.structs.replace(reply, identity=reply.channel, channel=reply.identity)


def _another_root(platform: Platform, reply: EnrolReply) -> EnrolReply:
    return msgspec.structs.replace(reply, root=Authority("root").pem)


def _another_domain(platform: Platform, reply: EnrolReply) -> EnrolReply:
    return msgspec.structs.replace(reply, domain=platform.root.subordinate("domain globex").pem)


def _garbage(platform: Platform, reply: EnrolReply) -> EnrolReply:
    return msgspec.structs.replace(reply, domain=b"nonsense")


def _another_signing_key(platform: Platform, reply: EnrolReply) -> EnrolReply:
    return msgspec.structs.replace(reply, kmc_signing_key=LocalSigner(new_key()).public_key)


@pytest.mark.parametrize(
    ("forge", "error"),
    [
        (_another_key, CertificateInvalid),
        (_swapped, CertificateInvalid),
        (_another_root, CertificateInvalid),
        (_another_domain, CertificateInvalid),
        (_garbage, CertificateInvalid),
        (_another_signing_key, CheckpointForged),
    ],
)
async def test_a_reply_that_does_not_fit(platform: Platform, forge: Forgery, error: type[CipherfleetError]) -> None:
    platform.kmc.forge_reply = lambda reply: forge(platform, reply)
    with pytest.raises(error):
        await platform.enrol()
    assert nothing_is_left(platform)


async def test_a_relative_folder(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = await platform.enrol(folder=Path("ukey"))
    assert result.ukey == os.fspath(tmp_path / "ukey")
