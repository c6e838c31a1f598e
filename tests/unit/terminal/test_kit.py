"""A recovery kit: enough shares bring the Ukey back, and whatever is wrong with them has a name."""

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from shamir_mnemonic import MnemonicError, combine_mnemonics, generate_mnemonics

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import new_key
from cipherfleet.contract.errors import CipherfleetError, ShareForeign, ShareInvalid, ShareRepeated, SharesTooFew, StateNewer
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.terminal import kit as kits
from cipherfleet.terminal.kit import KitHeader, ShareFile, recover, seal
from cipherfleet.terminal.memory import Remembered
from cipherfleet.terminal.pin import PinHash
from cipherfleet.terminal.spare import NewUkey
from cipherfleet.terminal.ukey import DirectoryUkey, PublicRecord, UkeySecrets
from tests.support import QUICK
from tests.unit.terminal.slip39_vectors import VECTORS

ACME, SERIAL, MADE_BY = ConsumerId("acme"), UkeyId("ukey-1a2b3c4d"), UkeyId("ukey-00000001")
CMK = b"c" * 40
SEEN = Seen(1, 5, b"h" * 32)


def new_ukey() -> NewUkey:
    secrets = UkeySecrets.new(new_key(), new_key())
    digest = hashlib.sha256(CMK).digest()
    record = PublicRecord(SERIAL, ACME, "https://a", "https://b", "r", "d", b"k", "i", "c", digest, PinHash.new(QUICK))
    return NewUkey(record, secrets, CMK, Remembered(SEEN, 7))


def shares_of(ukey: NewUkey, *, shares: int = 5, threshold: int = 3, kit: str = "00" * 8) -> list[tuple[str, bytes]]:
    header = KitHeader(1, kit, ACME, SERIAL, MADE_BY, 1.0, shares, threshold)
    return [(f"share {file.index}", codec.encode(file)) for file in seal(ukey, header)]


def test_any_three_of_five_bring_the_ukey_back_and_no_two_do(tmp_path: Path) -> None:
    ukey = new_ukey()
    files = shares_of(ukey)
    for chosen in itertools.combinations(files, 3):
        header, found = recover(chosen)
        assert (header.consumer, header.made_by, header.threshold, header.shares) == (ACME, MADE_BY, 3, 5)
        assert found.secrets.buffer == ukey.secrets.buffer
        assert (found.ciphertext_cmk, found.remembered) == (CMK, Remembered(SEEN, 7))
    assert recover(files)[1].secrets.buffer == ukey.secrets.buffer  # more than enough is enough
    for few in itertools.combinations(files, 2):
        with pytest.raises(SharesTooFew):
            recover(few)
    with pytest.raises(SharesTooFew):
        recover([])
    found.write(tmp_path / "ukey", "new-pin")
    with DirectoryUkey.open(tmp_path / "ukey", "new-pin") as opened:
        assert opened.record.serial == SERIAL
        assert opened.secrets.buffer == ukey.secrets.buffer


def test_a_threshold_that_a_share_lowers_does_not_help() -> None:
    """Whoever has two shares of three cannot say that two are enough: the words hold the number, and the kit is bound to it."""
    files = shares_of(new_ukey())
    lowered = []
    for name, raw in files[:2]:
        share = codec.decode(raw, ShareFile)
        header = msgspec.structs.replace(codec.decode(share.header, KitHeader), threshold=2)
        lowered.append((name, codec.encode(sealed_again(msgspec.structs.replace(share, header=msgspec.Raw(codec.encode(header)))))))
    with pytest.raises(ShareInvalid):
        recover(lowered)


def test_no_share_holds_a_secret_of_the_ukey() -> None:
    ukey = new_ukey()
    for _, raw in shares_of(ukey):
        share = codec.decode(raw, ShareFile)
        for secret in (bytes(ukey.secrets.share), bytes(ukey.secrets.buffer[:32]), CMK):
            assert secret not in raw
            assert secret not in share.kit


def sealed_again(share: ShareFile) -> ShareFile:
    """With a checksum that fits, as one who changes it on purpose would make it."""
    return msgspec.structs.replace(share, checksum=kits._checksum(share))


def test_shares_of_two_kits_and_one_share_twice() -> None:
    ours, other = shares_of(new_ukey()), shares_of(new_ukey(), kit="11" * 8)
    with pytest.raises(ShareForeign):
        recover([ours[0], ours[1], other[2]])
    with pytest.raises(ShareRepeated):
        recover([ours[0], ours[1], ours[0]])
    same_name = shares_of(new_ukey())
    with pytest.raises(ShareInvalid):
        recover([ours[0], ours[1], same_name[2]])


Change = Callable[[ShareFile], ShareFile]


def header_with(**changes: object) -> Change:
    def change(share: ShareFile) -> ShareFile:
        header = msgspec.structs.replace(codec.decode(share.header, KitHeader), **changes)
        return msgspec.structs.replace(share, header=msgspec.Raw(codec.encode(header)))

    return change


def other_words(share: ShareFile) -> ShareFile:
    """Words of another secret that pass every check of a single share."""
    words = generate_mnemonics(1, [(3, 5)], os.urandom(32), iteration_exponent=0)[0]
    return msgspec.structs.replace(share, words=words[share.index - 1])


CHANGES: dict[str, tuple[Change, type[CipherfleetError]]] = {
    "another consumer": (header_with(consumer=ConsumerId("other")), ShareInvalid),
    "another threshold": (header_with(threshold=2), ShareInvalid),
    "a later format": (header_with(version=2), StateNewer),
    "another word": (lambda s: msgspec.structs.replace(s, words=s.words.rsplit(" ", 1)[0] + " academic"), ShareInvalid),
    "a word that is none": (lambda s: msgspec.structs.replace(s, words=s.words.replace(" ", " zzz ", 1)), ShareInvalid),
    "words cut off": (lambda s: msgspec.structs.replace(s, words=s.words.rsplit(" ", 3)[0]), ShareInvalid),
    "no words": (lambda s: msgspec.structs.replace(s, words=""), ShareInvalid),
    "words of another secret": (other_words, ShareInvalid),
    "another index": (lambda s: msgspec.structs.replace(s, index=5), ShareInvalid),
    "a changed kit": (lambda s: msgspec.structs.replace(s, kit=s.kit[:-1] + bytes([s.kit[-1] ^ 1])), ShareInvalid),
    "no kit": (lambda s: msgspec.structs.replace(s, kit=b""), ShareInvalid),
}


@pytest.mark.parametrize("case", sorted(CHANGES))
def test_a_changed_share_is_refused(case: str) -> None:
    change, error = CHANGES[case]
    files = shares_of(new_ukey())
    share = codec.decode(files[0][1], ShareFile)
    for changed in (change(share), sealed_again(change(share))):
        with pytest.raises(error if changed.checksum != share.checksum else ShareInvalid):
            recover([("changed", codec.encode(changed)), *files[1:3]])


@pytest.mark.parametrize("case", ["another consumer", "a changed kit", "no kit"])
def test_a_change_in_all_shares_alike_is_refused_too(case: str) -> None:
    change, _ = CHANGES[case]
    files = [codec.decode(raw, ShareFile) for _, raw in shares_of(new_ukey())]
    with pytest.raises(ShareInvalid):
        recover([(str(file.index), codec.encode(sealed_again(change(file)))) for file in files[:3]])


def test_a_share_that_was_cut_off_is_refused() -> None:
    files = shares_of(new_ukey())
    for end in (0, 1, 100, len(files[0][1]) - 1):
        with pytest.raises(ShareInvalid):
            recover([("cut", files[0][1][:end]), *files[1:3]])


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_the_published_vectors_of_slip_39(number: int) -> None:
    words, secret = VECTORS[number]
    if secret:
        assert combine_mnemonics(words, b"TREZOR").hex() == secret
    else:
        with pytest.raises(MnemonicError):
            combine_mnemonics(words, b"TREZOR")
