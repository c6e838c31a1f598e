"""The embedded HSM: what the port promises, and its file."""

import errno
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cipherfleet.channel.certificates import public_key_der
from cipherfleet.contract.errors import (
    CmkInvalid,
    DiskFull,
    Exists,
    FileProblem,
    KeyUnknown,
    LimitReached,
    PassphraseWrong,
    StateNewer,
    StateNotWritable,
    TooLarge,
    Unsupported,
)
from cipherfleet.kmc import embedded_hsm
from cipherfleet.kmc.embedded_hsm import FILE, EmbeddedHsm
from cipherfleet.kmc.hsm import KeyHandle, Label, Mechanism, ensure_key_pair, ensure_wrap_key
from tests.unit.kmc.world import FAST, OAEP, PASSPHRASE, transport_key

CA, ROOT = Label("root-ca"), Label("root-key")


@pytest.fixture
def hsm(tmp_path: Path) -> EmbeddedHsm:
    return EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST)


def recipient() -> bytes:
    return public_key_der(transport_key().public_key())


async def test_a_key_pair_signs(hsm: EmbeddedHsm) -> None:
    handle = await hsm.generate_key_pair(CA)
    public = load_der_public_key(await hsm.public_key(handle))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(await hsm.sign(handle, b"data"), b"data", ec.ECDSA(hashes.SHA256()))
    assert await hsm.mechanisms() == frozenset(Mechanism)


async def test_keys_survive_a_restart_under_the_same_handles(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    pair, wrap = await hsm.generate_key_pair(CA), await hsm.generate_wrap_key(ROOT)
    public, wrapped = await hsm.public_key(pair), await hsm.generate_wrapped(wrap)
    share = transport_key().decrypt(await hsm.rewrap(wrap, wrapped, recipient()), OAEP)
    hsm.close()
    again = EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST)
    assert (await again.find(CA), await again.find(ROOT)) == (pair, wrap)
    assert await again.public_key(pair) == public
    assert transport_key().decrypt(await again.rewrap(wrap, wrapped, recipient()), OAEP) == share
    assert len(share) == 32


async def test_every_generated_secret_is_new(hsm: EmbeddedHsm) -> None:
    wrap = await hsm.generate_wrap_key(ROOT)
    assert await hsm.generate_wrapped(wrap) != await hsm.generate_wrapped(wrap)


async def test_a_label_is_given_once(hsm: EmbeddedHsm) -> None:
    handle = await ensure_key_pair(hsm, CA)
    assert await ensure_key_pair(hsm, CA) == handle
    assert await ensure_wrap_key(hsm, ROOT) == await ensure_wrap_key(hsm, ROOT)
    with pytest.raises(Exists):
        await hsm.generate_key_pair(CA)
    with pytest.raises(Exists):
        await hsm.generate_wrap_key(CA)


async def test_a_label_that_another_call_takes_first(hsm: EmbeddedHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a reply that got lost: the key is there, though ``find`` had not seen it."""
    handle, wrap = await hsm.generate_key_pair(CA), await hsm.generate_wrap_key(ROOT)
    find, unseen = hsm.find, {CA, ROOT}

    async def late(label: Label) -> KeyHandle | None:
        if label in unseen:
            unseen.remove(label)
            return None
        return await find(label)

    monkeypatch.setattr(hsm, "find", late)
    assert await ensure_key_pair(hsm, CA) == handle
    assert await ensure_wrap_key(hsm, ROOT) == wrap


async def test_a_handle_does_only_what_its_key_is_for(hsm: EmbeddedHsm) -> None:
    pair, wrap = await hsm.generate_key_pair(CA), await hsm.generate_wrap_key(ROOT)
    unknown = KeyHandle("0" * 32)
    for attempt in (
        hsm.sign(wrap, b""),
        hsm.sign(unknown, b""),
        hsm.public_key(wrap),
        hsm.generate_wrapped(pair),
        hsm.generate_wrapped(unknown),
    ):
        with pytest.raises(KeyUnknown):
            await attempt
    with pytest.raises(KeyUnknown):
        await hsm.rewrap(pair, bytes(40), recipient())


@pytest.mark.parametrize("change", ["first", "last", "cut", "empty", "long"])
async def test_a_changed_secret_is_not_rewrapped(hsm: EmbeddedHsm, change: str) -> None:
    wrap = await hsm.generate_wrap_key(ROOT)
    good = await hsm.generate_wrapped(wrap)
    bad = {
        "first": bytes([good[0] ^ 1]) + good[1:],
        "last": good[:-1] + bytes([good[-1] ^ 1]),
        "cut": good[:32],
        "empty": b"",
        "long": good * 2,
    }[change]
    with pytest.raises(CmkInvalid):
        await hsm.rewrap(wrap, bad, recipient())


async def test_another_wrap_key_does_not_unwrap(hsm: EmbeddedHsm) -> None:
    wrap, other = await hsm.generate_wrap_key(ROOT), await hsm.generate_wrap_key(Label("other"))
    with pytest.raises(CmkInvalid):
        await hsm.rewrap(other, await hsm.generate_wrapped(wrap), recipient())


async def test_only_a_strong_rsa_key_receives(hsm: EmbeddedHsm) -> None:
    wrap = await hsm.generate_wrap_key(ROOT)
    wrapped = await hsm.generate_wrapped(wrap)
    weak = public_key_der(rsa.generate_private_key(65537, 2048).public_key())
    other = public_key_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    for bad in (weak, other, b"garbage", b"", bytes(5000)):
        with pytest.raises(Unsupported):
            await hsm.rewrap(wrap, wrapped, bad)


async def test_a_destroyed_key_is_gone(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    handle = await hsm.generate_key_pair(CA)
    await hsm.destroy(handle)
    await hsm.destroy(handle)
    assert await hsm.find(CA) is None
    assert await EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST).find(CA) is None


async def test_limits(hsm: EmbeddedHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await hsm.generate_key_pair(CA)
    with pytest.raises(TooLarge):
        await hsm.sign(handle, bytes(32 * 1024 + 1))
    monkeypatch.setattr(embedded_hsm, "MAX_KEYS", 1)
    with pytest.raises(LimitReached):
        await hsm.generate_wrap_key(ROOT)


# -- the file ----------------------------------------------------------------------------------------------------------


async def test_the_file_is_private_and_shows_no_key(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    handle = await hsm.generate_wrap_key(ROOT)
    raw = (tmp_path / FILE).read_bytes()
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert bytes(hsm._wrap_key(handle)) not in raw
    assert ROOT.encode() not in raw
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE]


@pytest.mark.parametrize("passphrase", ["wrong", "", PASSPHRASE + " "])
def test_a_wrong_passphrase(hsm: EmbeddedHsm, tmp_path: Path, passphrase: str) -> None:
    with pytest.raises(PassphraseWrong) as caught:
        EmbeddedHsm.open(tmp_path, passphrase, FAST)
    assert PASSPHRASE not in str(caught.value)


@pytest.mark.parametrize("where", ["sealed", "nonce", "salt", "iterations"])
def test_a_changed_file_does_not_open(hsm: EmbeddedHsm, tmp_path: Path, where: str) -> None:
    path = tmp_path / FILE
    content = json.loads(path.read_bytes())
    if where == "iterations":
        content["parameters"]["iterations"] += 1
    else:
        holder = content["parameters"] if where == "salt" else content
        holder[where] = ("B" if holder[where][0] == "A" else "A") + holder[where][1:]
    path.write_text(json.dumps(content))
    with pytest.raises(PassphraseWrong):
        EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b'{"parameters": {"version": 1}}',
        b'{"parameters": {"version": 1, "salt": "", "memory_kib": 99999999, "iterations": 1, "lanes": 4}, "nonce": "", "sealed": ""}',
    ],
)
def test_a_damaged_file_says_so(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(FileProblem):
        EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST)


def test_a_newer_file_is_left_alone(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    path = tmp_path / FILE
    content = json.loads(path.read_bytes())
    content["parameters"]["version"] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(StateNewer):
        EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST)


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFull), (errno.EROFS, StateNotWritable)])
async def test_a_disk_that_refuses_changes_nothing(
    hsm: EmbeddedHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    handle = await hsm.generate_key_pair(CA)

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(number, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(embedded_hsm, "write_private", refuse)
        with pytest.raises(error):
            await hsm.generate_wrap_key(ROOT)
        with pytest.raises(error):
            await hsm.destroy(handle)
    assert await hsm.find(ROOT) is None
    assert await hsm.find(CA) == handle
    assert await EmbeddedHsm.open(tmp_path, PASSPHRASE, FAST).find(CA) == handle


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateNotWritable):
        EmbeddedHsm.open(tmp_path / "file" / "hsm", PASSPHRASE, FAST)


def test_zeroise() -> None:
    secret = bytearray(b"secret")
    embedded_hsm.zeroise(secret)
    assert secret == bytes(6)
    again = bytes(bytearray(b"another secret"))
    embedded_hsm._zeroise_bytes(again)
    assert again == bytes(14)
