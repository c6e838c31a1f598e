"""A file under a passphrase: what was changed, cut, moved or repeated in it does not open."""

import io
import tempfile
from pathlib import Path

import pytest

from cipherfleet.app.backup import sealed_file
from cipherfleet.app.backup.sealed_file import CHUNK_BYTES, MAGIC, new_header, open_sealed, seal
from cipherfleet.contract.errors import PassphraseWrong
from tests.support import QUICK, refusal

PASSPHRASE = b"a passphrase for tests"
SEALED_CHUNK = CHUNK_BYTES + 16
PATH = Path("backup")


def sealed(content: bytes) -> bytes:
    out = io.BytesIO()
    seal(out, new_header(QUICK, 0.0, len(content)), bytearray(PASSPHRASE), iter([content[:100], content[100:]]))
    return out.getvalue()


def opened(raw: bytes, passphrase: bytes = PASSPHRASE) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.seek(0)
        return b"".join(open_sealed(file, PATH, bytearray(passphrase)))


def start_of_chunks(raw: bytes) -> int:
    """Behind the header and what tells whether the passphrase is right."""
    return end_of_header(raw) + 16


def end_of_header(raw: bytes) -> int:
    return len(MAGIC) + 4 + int.from_bytes(raw[len(MAGIC) : len(MAGIC) + 4], "big")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_what_was_sealed_opens(size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    raw = sealed(content[:size])
    assert opened(raw) == content[:size]
    assert content[:64] not in raw


def test_another_passphrase_is_refused() -> None:
    assert refusal(lambda: opened(sealed(b"x"), b"another passphrase")) == "passphrase-wrong"


def test_every_cut_is_found() -> None:
    raw = sealed(bytes(2 * CHUNK_BYTES + 500))
    start = start_of_chunks(raw)
    for end in (1, len(MAGIC) - 1):
        assert refusal(lambda: opened(raw[:end])) == "backup-truncated", end  # noqa: B023
    for end in (
        len(MAGIC),
        len(MAGIC) + 2,
        start - 20,
        start - 1,
        start + 10,
        start + SEALED_CHUNK,
        start + SEALED_CHUNK + 9,
        len(raw) - 1,
    ):
        assert refusal(lambda: opened(raw[:end])) == "backup-truncated", end  # noqa: B023
    assert refusal(lambda: opened(raw + b"x")) == "backup-invalid"


def test_every_change_is_found() -> None:
    raw = sealed(bytes(2 * CHUNK_BYTES + 500))
    start = start_of_chunks(raw)
    places = {0: "backup-invalid", start - 1: "passphrase-wrong", start + 5: "backup-invalid", len(raw) - 1: "backup-invalid"}
    for place, code in places.items():
        changed = bytearray(raw)
        changed[place] ^= 1
        assert refusal(lambda: opened(bytes(changed))) == code, place  # noqa: B023
    chunks = [raw[start + n * SEALED_CHUNK : start + (n + 1) * SEALED_CHUNK] for n in range(3)]
    for order in ((1, 0, 2), (0, 0, 2), (1, 1, 2)):
        assert refusal(lambda: opened(raw[:start] + b"".join(chunks[n] for n in order))) == "backup-invalid", order  # noqa: B023


def test_a_header_that_asks_for_too_much_is_refused() -> None:
    raw = sealed(b"x")
    start = end_of_header(raw)
    for old, new in (
        (b'"memory_kib":8192', b'"memory_kib":9999999999'),
        (b'"version":1', b'"version":2'),
        (b'"lanes":4', b'"lanes":0'),
        (b'"size":1', b'"size":-1'),
    ):
        header = raw[len(MAGIC) + 4 : start].replace(old, new)
        changed = MAGIC + len(header).to_bytes(4, "big") + header + raw[start:]
        assert refusal(lambda: opened(changed)) in ("backup-invalid", "state-newer"), old  # noqa: B023


def test_a_weak_passphrase_is_refused() -> None:
    with pytest.raises(PassphraseWrong):
        sealed_file.check_passphrase(bytearray(b"1234567"))
