"""The plain face: the same methods, the same answers, no ``await``."""

import asyncio
import inspect
import io
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cipherfleet import Client, SyncClient
from cipherfleet.contract.errors import CertificateInvalid, CiphertextInvalid, FileProblem, MacInvalid, SignatureInvalid
from cipherfleet.contract.vcc import Operation
from tests.unit.services.stage import ALL_RIGHTS, Stage

T = TypeVar("T")
MIB = 1024 * 1024


def public(kind: type) -> dict[str, object]:
    return {name: value for name, value in inspect.getmembers_static(kind) if not name.startswith("_")}


def test_every_public_method_is_there() -> None:
    own = {"open", "close"}
    plain, asynchronous = public(SyncClient), public(Client)
    assert set(plain) == set(asynchronous) | {"profile"}
    for name in set(asynchronous) - own:
        wrapper = plain[name]
        assert getattr(wrapper, "_method", None) is asynchronous[name], name
        assert wrapper.__doc__ == asynchronous[name].__doc__
        streams = not inspect.iscoroutinefunction(asynchronous[name])
        assert type(wrapper).__name__ == ("_Stream" if streams else "_Call"), name


async def aside(work: Callable[[], T]) -> T:
    """Run blocking work in a thread, while the VCM serves in this loop."""
    return await asyncio.to_thread(work)


@pytest.fixture
async def plain(stage: Stage) -> AsyncIterator[SyncClient]:
    client = SyncClient(stage.profile())
    await aside(client.open)
    yield client
    await aside(client.close)


async def test_the_whole_of_it(plain: SyncClient, tmp_path: Path) -> None:
    def work() -> None:
        key = plain.create_key("AES-256-GCM", label="orders")
        assert plain.describe_key(key.id) == key
        data = os.urandom(3 * MIB)
        ciphertext = plain.encrypt(key.id, data, context=b"c")
        assert plain.decrypt(ciphertext, context=b"c") == data
        assert b"".join(plain.decrypt_stream(plain.encrypt_stream(key.id, io.BytesIO(data)))) == data
        assert b"".join(plain.decrypt_stream(plain.reencrypt_stream(key.id, ciphertext, context=b"c"))) == data
        assert plain.decrypt(plain.reencrypt(key.id, ciphertext, context=b"c")) == data
        (tmp_path / "a").write_bytes(data)
        plain.encrypt_file(key.id, tmp_path / "a", tmp_path / "b")
        plain.reencrypt_file(key.id, tmp_path / "b", tmp_path / "b")
        plain.decrypt_file(tmp_path / "b", tmp_path / "c")
        assert (tmp_path / "c").read_bytes() == data
        assert len(plain.generate_data_key(key.id, length=16).plaintext or b"") == 16
        signer, mac = plain.create_key("Ed25519"), plain.create_key("HMAC-SHA-256")
        plain.verify(signer.id, b"m", plain.sign(signer.id, b"m"))
        assert plain.sign_with_version(signer.id, b"m").version == 1
        with pytest.raises(SignatureInvalid):
            plain.verify(signer.id, b"m", b"x")
        plain.verify_mac(mac.id, b"m", plain.mac(mac.id, b"m"))
        with pytest.raises(MacInvalid):
            plain.verify_mac(mac.id, b"m", bytes(32))
        assert len(plain.digest("SHA-384", b"m")) == 48
        assert len(plain.random(5)) == 5
        assert plain.rotate_key(key.id).version == 2
        assert plain.disable_key(key.id).state == "disabled"
        assert plain.enable_key(key.id).state == "enabled"
        assert plain.delete_key(key.id).state == "deleted"
        assert plain.import_key("AES-256-GCM", bytes(32)).imported
        assert len(plain.list_keys()) == 4
        assert len(plain.algorithms()) >= 10
        assert plain.audit()
        assert plain.endpoints()
        assert plain.health().serving

    await aside(work)


async def test_threads_share_a_client(plain: SyncClient) -> None:
    key = await aside(plain.create_key)

    def work() -> bool:
        data = os.urandom(200_000)
        return plain.decrypt(plain.encrypt(key.id, data)) == data

    assert all(await asyncio.gather(*(aside(work) for _ in range(8))))


async def test_errors_are_raised_in_the_callers_thread(plain: SyncClient) -> None:
    key = await aside(plain.create_key)

    def broken() -> Iterator[bytes]:
        yield b"x" * MIB
        raise KeyError("of the source")

    def work() -> None:
        with pytest.raises(CiphertextInvalid):
            plain.decrypt(bytes(100))
        with pytest.raises(KeyError):
            list(plain.encrypt_stream(key.id, broken()))

    await aside(work)


async def test_an_iteration_that_is_left_ends_the_stream(stage: Stage, plain: SyncClient) -> None:
    key = await aside(plain.create_key)
    aborted = asyncio.Event()

    async def look(operation: Operation) -> None:
        if operation is Operation.ABORT:
            aborted.set()

    stage.host.card.before = look

    def work() -> None:
        for _ in plain.encrypt_stream(key.id, bytes(32 * MIB)):
            break

    await aside(work)
    await aborted.wait()


async def test_close_waits_for_connections_that_were_left_half_read(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        with SyncClient(stage.profile()) as client:
            key = client.create_key("AES-256-GCM")
        for _ in range(10):
            with SyncClient(stage.profile()) as client:
                next(iter(client.encrypt_stream(key.id, bytes(8 * MIB))))

    await aside(work)
    assert not caplog.records  # a loop that is closed under a connection says so here, or raises


async def test_the_thread_starts_with_open_and_ends_with_close(stage: Stage) -> None:
    def work() -> None:
        before = threading.active_count()
        client = SyncClient(stage.profile())
        with pytest.raises(RuntimeError, match="not open"):
            client.list_keys()
        with client:
            client.open()
            assert client.profile.rights == ALL_RIGHTS
            assert client.list_keys() == ()
            left = client.encrypt_stream("0" * 32, bytes(10))
        assert threading.active_count() <= before + 1
        with pytest.raises(RuntimeError, match="not open"):
            next(left)
        client.close()

    await aside(work)


async def test_a_profile_that_cannot_be_used_leaves_no_thread(stage: Stage, tmp_path: Path) -> None:
    broken = stage.profile(credentials=None)
    with pytest.raises(FileProblem):
        SyncClient(tmp_path / "missing")

    def work() -> None:
        import msgspec

        with pytest.raises(CertificateInvalid), SyncClient(msgspec.structs.replace(broken, key="")):
            pass

    await aside(work)
    assert not [t for t in threading.enumerate() if t.name == "cipherfleet client"]
