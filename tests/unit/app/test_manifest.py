"""What the inside of a backup must be, whoever wrote it."""

import struct
from collections.abc import Iterator

import msgspec
import pytest

from cipherfleet.app.backup.manifest import HSM, KMC, MANAGEMENT, BackupFile, Content, Manifest, pack
from cipherfleet.app.record import CloudRecord
from tests.support import refusal

FILES = tuple(BackupFile(name, 3, bytes(32)) for name in (MANAGEMENT, KMC, HSM))
GOOD = Manifest(1, "0.1.0", 0.0, CloudRecord(1, 16, "process", 2), FILES, ())


def content(raw: bytes) -> Content:
    return Content(iter([raw[:7], raw[7:]]))


def read_all(reading: Content) -> list[bytes]:
    found = [b"".join(reading.file(file.size)) for file in reading.manifest().files]
    reading.end()
    return found


def test_files_come_back_in_order() -> None:
    assert read_all(content(pack(GOOD) + b"abcdefghi")) == [b"abc", b"def", b"ghi"]


def test_less_or_more_than_the_manifest_says_is_refused() -> None:
    assert refusal(lambda: read_all(content(pack(GOOD) + b"abcdefgh"))) == "backup-truncated"
    assert refusal(lambda: read_all(content(pack(GOOD) + b"abcdefghij"))) == "backup-invalid"
    assert refusal(lambda: read_all(content(struct.pack(">I", 2**31)))) == "backup-invalid"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"files": FILES[:2]}, "backup-invalid"),
        ({"files": (*FILES, FILES[0])}, "backup-invalid"),
        ({"files": (*FILES, BackupFile("../../etc/passwd", 0, bytes(32)))}, "backup-invalid"),
        ({"version": 2}, "state-newer"),
    ],
)
def test_a_manifest_of_something_else_is_refused(change: dict[str, object], code: str) -> None:
    manifest = msgspec.structs.replace(GOOD, **change)
    assert refusal(lambda: content(pack(manifest)).manifest()) == code


def test_nothing_is_read_that_was_not_asked_for() -> None:
    def chunks() -> Iterator[bytes]:
        yield pack(GOOD)
        raise AssertionError("the manifest is whole")

    assert Content(chunks()).manifest() == GOOD
