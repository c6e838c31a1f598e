"""The plain face of the client: the same methods without ``await``, run by an event loop in a thread of its own."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import uvloop

from cipherfleet.contract.profile import Profile
from cipherfleet.services.middleware.client import TIMEOUT_S, Client

P = ParamSpec("P")
R = TypeVar("R")


class _Call(Generic[P, R]):
    """A method of ``Client`` as one that blocks."""

    def __init__(self, method: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> "_Call[P, R]": ...

    @overload
    def __get__(self, instance: "SyncClient", owner: type) -> Callable[P, R]: ...

    def __get__(self, instance: "SyncClient | None", owner: type) -> "_Call[P, R] | Callable[P, R]":
        if instance is None:
            return self

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return instance._wait(self._method(instance._client, *args, **kwargs))

        call.__doc__ = self.__doc__
        return call


class _Stream(Generic[P]):
    """A method of ``Client`` that yields, as one that gives a plain iterator."""

    def __init__(self, method: Callable[Concatenate[Client, P], AsyncIterator[bytes]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> "_Stream[P]": ...

    @overload
    def __get__(self, instance: "SyncClient", owner: type) -> Callable[P, Iterator[bytes]]: ...

    def __get__(self, instance: "SyncClient | None", owner: type) -> "_Stream[P] | Callable[P, Iterator[bytes]]":
        if instance is None:
            return self

        def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[bytes]:
            return instance._iterate(self._method(instance._client, *args, **kwargs))

        call.__doc__ = self.__doc__
        return call


class SyncClient:
    """``Client`` for programs without an event loop; may be shared by threads.

    ::

        with SyncClient("shop.json") as client:
            key = client.create_key("AES-256-GCM")
            ciphertext = client.encrypt(key.id, b"a secret")
    """

    def __init__(self, profile: Profile | str | os.PathLike[str], *, timeout: float = TIMEOUT_S) -> None:
        self._client = Client(profile, timeout=timeout)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def profile(self) -> Profile:
        return self._client.profile

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open(self) -> None:
        """Start the thread and load the certificate. Raises ``CertificateInvalid``."""
        if self._loop is not None:
            return
        loop = self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="cipherfleet client", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        try:
            self._wait(self._end())
        finally:
            self._loop = self._thread = None
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    create_key = _Call(Client.create_key)
    import_key = _Call(Client.import_key)
    create_keys = _Call(Client.create_keys)
    import_keys = _Call(Client.import_keys)
    delegate_key = _Call(Client.delegate_key)
    revoke_delegation = _Call(Client.revoke_delegation)
    list_delegations = _Call(Client.list_delegations)
    key_page = _Call(Client.key_page)
    list_keys = _Call(Client.list_keys)
    describe_key = _Call(Client.describe_key)
    rotate_key = _Call(Client.rotate_key)
    enable_key = _Call(Client.enable_key)
    disable_key = _Call(Client.disable_key)
    delete_key = _Call(Client.delete_key)
    schedule_key_deletion = _Call(Client.schedule_key_deletion)
    derive_key = _Call(Client.derive_key)
    destruction_receipt = _Call(Client.destruction_receipt)
    cancel_key_deletion = _Call(Client.cancel_key_deletion)
    import_parameters = _Call(Client.import_parameters)
    import_wrapped = _Call(Client.import_wrapped)
    export_key = _Call(Client.export_key)
    trim_key = _Call(Client.trim_key)
    update_key = _Call(Client.update_key)
    set_alias = _Call(Client.set_alias)
    delete_alias = _Call(Client.delete_alias)
    list_aliases = _Call(Client.list_aliases)
    encrypt = _Call(Client.encrypt)
    decrypt = _Call(Client.decrypt)
    reencrypt = _Call(Client.reencrypt)
    encrypt_stream = _Stream(Client.encrypt_stream)
    decrypt_stream = _Stream(Client.decrypt_stream)
    reencrypt_stream = _Stream(Client.reencrypt_stream)
    encrypt_file = _Call(Client.encrypt_file)
    decrypt_file = _Call(Client.decrypt_file)
    reencrypt_file = _Call(Client.reencrypt_file)
    generate_data_key = _Call(Client.generate_data_key)
    sign = _Call(Client.sign)
    sign_with_version = _Call(Client.sign_with_version)
    verify = _Call(Client.verify)
    mac = _Call(Client.mac)
    verify_mac = _Call(Client.verify_mac)
    digest = _Call(Client.digest)
    random = _Call(Client.random)
    agree = _Call(Client.agree)
    derive = _Call(Client.derive)
    encapsulate = _Call(Client.encapsulate)
    decapsulate = _Call(Client.decapsulate)
    batch = _Call(Client.batch)
    algorithms = _Call(Client.algorithms)
    policy = _Call(Client.policy)
    audit = _Call(Client.audit)
    audit_page = _Call(Client.audit_page)
    verify_audit = _Call(Client.verify_audit)
    endpoints = _Call(Client.endpoints)
    health = _Call(Client.health)

    async def _end(self) -> None:
        """Close the client and whatever still runs in its loop."""
        await self._client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.get_running_loop().shutdown_default_executor()

    def _wait(self, work: Coroutine[Any, Any, R]) -> R:
        if self._loop is None:
            work.close()
            raise RuntimeError("the client is not open: use `with SyncClient(...)`")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C ends the work too
            raise

    def _iterate(self, pieces: AsyncIterator[bytes]) -> Iterator[bytes]:
        try:
            while (piece := self._wait(_next(pieces))) is not None:
                yield piece
        finally:
            if self._loop is not None:
                self._wait(_end_of(pieces))


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    return await anext(pieces, None)


async def _end_of(pieces: AsyncIterator[bytes]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()
