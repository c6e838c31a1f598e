"""The operator who has everything of the platform: disk, HSM passphrase, memory, and every message in plaintext.

After the Ukey went, nothing decrypts; while it is in, no application and no grant can be slipped in.
"""

import asyncio
import contextlib
import json
import os
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cipherfleet.app import wiring
from cipherfleet.computing.engine_wrap import unwrap
from cipherfleet.contract.errors import EscrowRowTampered
from cipherfleet.contract.ids import ConsumerId
from tests.security.chain import ROOT_LABEL, cmk_of, in_bytes, in_files, in_memory, key_chain, open_hsm, rows_of, unwrap_share, wrapping_of
from tests.support import TestCloud, cloud_in, eventually

TAP = """
import runpy, sys
from cipherfleet.channel import codec
record = open(sys.argv[1], "ab", buffering=0)
real_encode, real_decode = codec.encode, codec.decode
def encode(value):
    raw = real_encode(value)
    record.write(raw + b"\\n")
    return raw
def decode(raw, kind, **options):
    record.write(bytes(raw) + b"\\n")
    return real_decode(raw, kind, **options)
codec.encode, codec.decode = encode, decode
sys.argv = ["roles", sys.argv[2]]
runpy.run_module("cipherfleet.app.roles", run_name="__main__")
"""


@pytest.fixture
def tapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestCloud]:
    """A cloud whose KMC and management write down all that they say and hear, as plaintext."""
    (tmp_path / "tap.py").write_text(TAP)
    plain = wiring._command

    def command(role: str) -> list[str]:
        if role in ("kmc", "management"):
            return [sys.executable, str(tmp_path / "tap.py"), str(tmp_path / "recorded"), role]
        return plain(role)

    monkeypatch.setattr(wiring, "_command", command)
    with cloud_in(tmp_path, machines=1) as cloud:
        yield cloud


def recorded_values(path: Path) -> Iterator[bytes]:
    """Every byte string of every recorded message, however deep, decoded."""

    def walk(value: Any) -> Iterator[bytes]:
        if isinstance(value, dict):
            for part in value.values():
                yield from walk(part)
        elif isinstance(value, list):
            for part in value:
                yield from walk(part)
        elif isinstance(value, str):
            yield value.encode()
            try:
                inner = b64decode(value, validate=True)
            except ValueError:
                return
            yield inner
            try:
                yield from walk(json.loads(inner))
            except ValueError:
                return

    for line in path.read_bytes().splitlines():
        try:
            yield from walk(json.loads(line))
        except ValueError:
            continue


def windows(values: set[bytes]) -> Iterator[bytes]:
    """Everything of 32 bytes that was ever said."""
    for value in values:
        for start in range(max(0, len(value) - 31)):
            yield value[start : start + 32]


def test_with_everything_the_operator_has_nothing_decrypts(tapped: TestCloud, tmp_path: Path) -> None:
    consumer = tapped.enrol("acme")
    consumer.plug_in()
    with consumer.client() as client:
        key = client.create_key("AES-256-GCM")
        client.encrypt(key.id, b"the secret")
    chain = key_chain(tapped, consumer)
    consumer.pull()
    eventually(lambda: consumer.vcms() == [], what="the VCM is gone")

    row = next(r for r in rows_of(tapped, "acme") if r.version == 1)
    values = set(recorded_values(tmp_path / "recorded"))
    released = next(json.loads(line) for line in (tmp_path / "recorded").read_bytes().splitlines() if b'"CmkReleased"' in line)
    hsm_share = asyncio.run(unwrap_share(open_hsm(tapped), b64decode(released["ciphertext_cmk"]), ROOT_LABEL))
    assert hsm_share == chain.hsm_share, "the operator of an embedded HSM gets this half"

    def opens(candidate: bytes) -> bool:
        """As the Ukey's half, as the CMK, or as the key that wraps."""
        for wrapping in (wrapping_of(cmk_of(hsm_share, candidate, "acme")), wrapping_of(candidate), candidate):
            with contextlib.suppress(EscrowRowTampered):
                unwrap(bytearray(wrapping), ConsumerId("acme"), row)
                return True
        return False

    for half in (chain.ukey_share, chain.cmk, chain.wrapping):
        assert opens(half), "positive control: with the consumer's half it does open"
    tried = 0
    for candidate in {w for w in windows({v for v in values if len(v) <= 8192}) if len(set(w)) > 8}:
        tried += 1
        assert not opens(candidate)
    assert tried > 1000
    print(f"{tried} candidates from {len(values)} recorded values tried")  # noqa: T201
    secrets = {"Ukey share": chain.ukey_share, **chain.secrets()}
    assert in_bytes(values, {"HSM share, wrapped": b64decode(released["ciphertext_cmk"])}), "positive control"
    assert in_bytes(values, secrets) == set(), "said, inside of whatever else"
    assert in_files(tmp_path, secrets) == set(), "disk and record"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="reading the memory of other processes needs root")
def test_no_memory_of_the_operators_holds_what_decrypts(tapped: TestCloud) -> None:
    """While the Ukey is in, and after it went."""
    consumer = tapped.enrol("acme")
    consumer.plug_in()
    with consumer.client() as client:
        client.create_key("AES-256-GCM")
    chain = key_chain(tapped, consumer)
    halves = {"Ukey share": chain.ukey_share, **chain.secrets()}
    for moment in ("in", "out"):
        for process in tapped.processes("kmc", "management", "hsm", "machine"):
            assert not in_memory(process.pid, halves), f"{process.role}, Ukey {moment}"
        if moment == "in":
            consumer.pull()
            eventually(lambda: consumer.vcms() == [], what="the VCM is gone")


def test_the_record_is_complete(tapped: TestCloud, tmp_path: Path) -> None:
    """Positive control of the test above: both messages of the CMK were recorded."""
    tapped.enrol("acme").plug_in()
    recorded = (tmp_path / "recorded").read_bytes()
    for frame in (b'"DownloadSignal"', b'"CmkReleased"', b'"CmkDelivered"', b'"LeaseSigned"', b'"LoginPermit"'):
        assert frame in recorded
