"""The consumer's keys in a VCM: a real card, and an escrow that can be told to misbehave."""

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import pytest

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.sealing import TrustedCard, import_info
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.computing.vcm_chores import Chores
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.computing.vcm_key_life import KeyLife
from cipherfleet.computing.vcm_keys import Keys
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    BadInput,
    CheckpointForged,
    CipherfleetError,
    EscrowRolledBack,
    EscrowRowForeign,
    EscrowRowTampered,
    KeyDeleted,
    KeyDisabled,
    KeyUnknown,
    KeyUsesSpent,
    KmcUnavailable,
    LimitReached,
    SealedForeign,
    ServiceOff,
    StateConflict,
    WrongKeyType,
)
from cipherfleet.contract.escrow import KeyAttributes, KeyState, Seen, decode_attributes, genesis, row_digest
from cipherfleet.contract.ids import KeyId, VcmId, new_key_id, new_vcm_id
from cipherfleet.contract.key_life import DAY_S
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.kmc_api import EscrowReceipt, LogPage, RowsReply
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import CheckpointStatement
from cipherfleet.contract.vcc import CardDescription, KeyMaterial, Operation, StreamRequest, Verb
from cipherfleet.contract.vcm import KeyStore
from cipherfleet.contract.vcm_api import KeyDescription, KeyImportRequest, KeyQuery, KeysCreateRequest
from tests.unit.computing.machine.fake_kmc import EPOCH, FakeConsumer, FakeKmc, signed
from tests.unit.computing.machine.stage import CardOfTests

T = TypeVar("T")


@dataclass
class Store:
    """One VCM's store, and all around it."""

    consumer: FakeConsumer
    card: RingCard
    escrow: Escrow
    keys: Keys

    async def encrypt(self, key: KeyId, data: bytes) -> bytes:
        with self.keys.hold():
            use = await self.keys.use(key)
            request = codec.encode(StreamRequest(Verb.ENCRYPT))
            return (await self.card.submit(Operation.RUN, handle=use.handle, parameters=request, data=data)).data

    async def decrypt(self, key: KeyId, version: int, ciphertext: bytes) -> bytes:
        use = await self.keys.use(key, version=version)
        request = codec.encode(StreamRequest(Verb.DECRYPT, header=ciphertext[:62]))
        return (await self.card.submit(Operation.RUN, handle=use.handle, parameters=request, data=ciphertext[62:])).data


class World:
    """One consumer with a card; ``store`` gives one more VCM of it."""

    def __init__(self) -> None:
        self.kmc = FakeKmc()
        self.consumer = self.kmc.consumer("acme")
        self.card = CardOfTests(self.kmc)
        self.vccs: list[RingCard] = []

    async def vcc(self, vcm: VcmId | None = None) -> RingCard:
        self.vccs.append(await self.card.vcc(vcm or new_vcm_id(), self.consumer, self.kmc))
        return self.vccs[-1]

    async def store(self, *, load: bool = True) -> Store:
        vcc = await self.vcc()
        escrow = Escrow(self.consumer.name, self.consumer, self.kmc.signing_key)
        if load:
            await escrow.load(Seen(EPOCH, len(self.consumer.log), self.consumer.head()))
        return Store(self.consumer, vcc, escrow, Keys(escrow, vcc))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    for vcc in made.vccs:
        await vcc.close()
    made.card.server.close()


@pytest.fixture
async def store(world: World) -> Store:
    return await world.store()


async def listed(keys: Keys, query: KeyQuery = KeyQuery()) -> list[KeyDescription]:  # noqa: B008
    """All pages."""
    found: list[KeyDescription] = []
    while True:
        page = await keys.list_keys(query)
        found += page.keys
        if not page.next:
            return found
        query = msgspec.structs.replace(query, after=page.next)


def test_it_is_a_key_store(store: Store) -> None:
    port: KeyStore = store.keys
    assert port is store.keys


async def test_a_created_key_is_in_the_escrow_when_it_is_acknowledged(store: Store) -> None:
    made = await store.keys.create("aes-256-gcm", label="files", actor="application/billing")
    assert (made.algorithm, made.version, made.state, made.label, made.created_by) == (
        "AES-256-GCM",
        1,
        "enabled",
        "files",
        "application/billing",
    )
    assert made.versions == (1,)
    assert made.uses == ("encrypt",)
    assert set(store.consumer.rows) == {(made.id, 0), (made.id, 1)}
    assert store.escrow.seen == Seen(EPOCH, 2, store.consumer.head())
    assert await store.decrypt(made.id, 1, await store.encrypt(made.id, b"hello")) == b"hello"
    assert await store.keys.describe(made.id) == made
    assert await listed(store.keys) == [made]


async def test_a_signature_keys_public_key_is_shown(world: World, store: Store) -> None:
    made = await store.keys.create("Ed25519", label="", actor="a")
    assert len(made.public_key) == 44  # RFC 8410: 12 bytes of header, 32 of key
    store.keys._handles.forget()
    assert (await store.keys.describe(made.id)).public_key == made.public_key
    other = await world.store()
    assert (await other.keys.describe(made.id)).public_key == made.public_key
    assert (await describe(other)).keys == 1  # loaded, so that the card has checked it


async def test_an_imported_key_is_in_the_escrow_and_says_what_it_is(world: World, store: Store) -> None:
    vcm = codec.decode((await store.card.submit(Operation.DESCRIBE)).parameters, CardDescription)
    card = TrustedCard(vcm.card, world.card.card.transport.hpke_public_key)
    material = codec.encode(KeyMaterial(store.consumer.name, "AES-256-GCM", bytes(range(32))))
    made = await store.keys.import_key(
        KeyImportRequest("AES-256-GCM", card.seal(material, import_info(vcm.card, vcm.vcm)), "mine"), actor="a"
    )
    assert made.imported
    assert await store.decrypt(made.id, 1, await store.encrypt(made.id, b"hello")) == b"hello"
    with pytest.raises(SealedForeign):
        await store.keys.import_key(KeyImportRequest("AES-256-GCM", b"x" * 2000, ""), actor="a")
    rotated = await store.keys.rotate(made.id, actor="a")
    assert not rotated.imported  # the card made the new version
    assert set(store.consumer.rows) == {(made.id, 0), (made.id, 1), (made.id, 2)}


@pytest.mark.parametrize(("name", "error"), [("ROT13", AlgorithmUnknown), ("SHA-256", WrongKeyType)])
async def test_what_is_no_kind_of_key_is_refused(store: Store, name: str, error: type[CipherfleetError]) -> None:
    with pytest.raises(error):
        await store.keys.create(name, label="", actor="a")
    assert not store.consumer.rows


async def test_before_the_escrow_is_loaded_there_is_no_service(world: World) -> None:
    store = await world.store(load=False)
    for work in (store.keys.create("AES-256-GCM", label="", actor="a"), store.keys.use(new_key_id()), store.keys.list_keys(KeyQuery())):
        with pytest.raises(ServiceOff):
            await work


async def test_a_key_that_the_escrow_did_not_take_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unreachable(*_: object, **__: object) -> object:
        raise KmcUnavailable("gone")

    before = (await describe(store)).keys
    with monkeypatch.context() as patch:
        patch.setattr(store.consumer, "call", unreachable)
        with pytest.raises(KmcUnavailable):
            await store.keys.create("AES-256-GCM", label="", actor="a")
    assert await listed(store.keys) == []
    assert (await describe(store)).keys == before


async def describe(store: Store) -> "Description":
    done = await store.card.submit(Operation.DESCRIBE)
    return codec.decode(done.parameters, Description)


class Description(msgspec.Struct):
    keys: int


async def test_rotation_keeps_the_old_version_decrypting(store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    old = await store.encrypt(made.id, b"old")
    rotated = await store.keys.rotate(made.id, actor="a")
    assert (rotated.version, rotated.versions) == (2, (1, 2))
    new = await store.encrypt(made.id, b"new")
    assert await store.decrypt(made.id, 1, old) == b"old"
    assert await store.decrypt(made.id, 2, new) == b"new"
    for version in (0, 3, -1):
        with pytest.raises(KeyUnknown):
            await store.keys.use(made.id, version=version)


async def test_a_disabled_key_refuses_everything_and_comes_back(store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    assert (await store.keys.set_state(made.id, KeyState.DISABLED, actor="a")).state == "disabled"
    with pytest.raises(KeyDisabled):
        await store.keys.use(made.id)
    with pytest.raises(KeyDisabled):
        await store.keys.rotate(made.id, actor="a")
    written = len(store.consumer.log)
    await store.keys.set_state(made.id, KeyState.DISABLED, actor="a")
    assert len(store.consumer.log) == written
    await store.keys.set_state(made.id, KeyState.ENABLED, actor="a")
    assert (await store.keys.use(made.id)).version == 1


async def test_a_deleted_key_stays_deleted_and_leaves_the_card(store: Store) -> None:
    made = await store.keys.create("Ed25519", label="", actor="a")
    await store.keys.rotate(made.id, actor="a")
    loaded = (await describe(store)).keys
    gone = await store.keys.destroy(made.id, actor="a")
    assert (gone.state, gone.public_key) == ("deleted", b"")
    assert (await describe(store)).keys == loaded - 2
    with pytest.raises(KeyDeleted):
        await store.keys.use(made.id)
    with pytest.raises(KeyDeleted):
        await store.keys.set_state(made.id, KeyState.ENABLED, actor="a")
    with pytest.raises(KeyDeleted):
        await store.keys.rotate(made.id, actor="a")
    assert [d.state for d in await listed(store.keys)] == ["deleted"]


async def test_handles_are_loaded_when_needed_and_once(world: World, store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    other = await world.store()
    first, second = await asyncio.gather(other.keys.use(made.id), other.keys.use(made.id))
    assert first == second
    assert (await describe(other)).keys == 1


async def test_what_another_vcm_did_is_seen(world: World, store: Store) -> None:
    other = await world.store()
    made = await other.keys.create("AES-256-GCM", label="", actor="a")
    assert (await store.keys.use(made.id)).version == 1  # unknown here: looked up
    await other.keys.rotate(made.id, actor="a")
    assert (await store.keys.use(made.id, version=2)).version == 2  # likewise
    await other.keys.destroy(made.id, actor="a")
    await store.keys.refresh()
    assert (await describe(store)).keys == 0
    with pytest.raises(KeyDeleted):
        await store.keys.use(made.id)


async def test_of_two_changes_at_once_the_second_is_made_on_top_of_the_first(world: World, store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    other = await world.store()
    await other.keys.rotate(made.id, actor="b")
    rotated = await store.keys.rotate(made.id, actor="a")  # its row is the old one: StateConflict, then again
    assert rotated.versions == (1, 2, 3)
    assert rotated.version == 3
    await other.keys.create("AES-256-GCM", label="in between", actor="b")
    await store.keys.create("AES-256-GCM", label="after", actor="a")  # the receipt does not continue what was seen
    assert len(await listed(store.keys)) == 3


async def test_whoever_is_beaten_twice_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")

    async def beaten(*_: object, **__: object) -> None:
        raise StateConflict("again")

    monkeypatch.setattr(store.escrow, "write", beaten)
    with pytest.raises(StateConflict):
        await store.keys.rotate(made.id, actor="a")


async def test_a_key_of_nobody_or_of_another_consumer_is_unknown(world: World, store: Store) -> None:
    kmc, card = world.kmc, world.card
    other = kmc.consumer("rival")
    vcc = await card.vcc(new_vcm_id(), other, kmc)
    world.vccs.append(vcc)
    escrow = Escrow(other.name, other, kmc.signing_key)
    await escrow.load(Seen(EPOCH, 0, other.head()))
    foreign = await Keys(escrow, vcc).create("AES-256-GCM", label="", actor="a")
    for key in (new_key_id(), foreign.id):
        with pytest.raises(KeyUnknown):
            await store.keys.describe(key)


async def test_asking_for_unknown_keys_does_not_flood_the_escrow(store: Store) -> None:
    store.consumer.calls.clear()
    results = await asyncio.gather(*(store.keys.use(new_key_id()) for _ in range(50)), return_exceptions=True)
    assert all(isinstance(r, KeyUnknown) for r in results)
    assert len(store.consumer.calls) <= 2


# -- many keys ---------------------------------------------------------------------------------------------------------


async def test_many_at_once_are_all_there(world: World, store: Store) -> None:
    loaded = (await describe(store)).keys
    made = await store.keys.create_many(KeysCreateRequest("aes-256-gcm", tuple([f"key {n}" for n in range(100)])), actor="a")
    assert [key.label for key in made] == [f"key {n}" for n in range(100)]
    assert store.consumer.calls.count("POST /v1/escrow") == 1
    assert (await describe(store)).keys == loaded  # a key is loaded when it is used
    assert await listed(store.keys) == made
    other = await world.store()
    assert await listed(other.keys) == made
    assert await other.decrypt(made[7].id, 1, await store.encrypt(made[7].id, b"hello")) == b"hello"
    signers = await store.keys.create_many(KeysCreateRequest("Ed25519", ("", "")), actor="a")
    assert len({key.public_key for key in signers}) == 2


async def test_of_many_none_is_there_when_one_is_wrong(world: World, store: Store) -> None:
    vcm = codec.decode((await store.card.submit(Operation.DESCRIBE)).parameters, CardDescription)
    card = TrustedCard(vcm.card, world.card.card.transport.hpke_public_key)
    material = codec.encode(KeyMaterial(store.consumer.name, "AES-256-GCM", bytes(range(32))))
    good = KeyImportRequest("AES-256-GCM", card.seal(material, import_info(vcm.card, vcm.vcm)), "mine")
    loaded = vcm.keys
    with pytest.raises(SealedForeign):
        await store.keys.import_many([good] * 5 + [msgspec.structs.replace(good, sealed=b"x" * 2000)] + [good] * 5, actor="a")
    with pytest.raises(AlgorithmUnknown):
        await store.keys.import_many([good, msgspec.structs.replace(good, algorithm="ROT13")], actor="a")
    assert not store.consumer.rows
    assert (await describe(store)).keys == loaded
    made = await store.keys.import_many([good] * 3, actor="a")
    assert [(key.imported, key.label) for key in made] == [(True, "mine")] * 3
    assert len({key.id for key in made}) == 3


async def test_pages_are_in_the_order_of_creation_and_whole(world: World, store: Store) -> None:
    made = await store.keys.create_many(KeysCreateRequest("AES-256-GCM", tuple([str(n) for n in range(7)])), actor="a")
    first = await store.keys.list_keys(KeyQuery(limit=3))
    assert [key.label for key in first.keys] == ["0", "1", "2"]
    made.append(await store.keys.create("AES-256-GCM", label="new", actor="a"))
    await store.keys.destroy(made[4].id, actor="a")
    rest = await listed((await world.store()).keys, KeyQuery(limit=3, after=first.next))  # any VCM goes on
    assert [key.label for key in rest] == ["3", "4", "5", "6", "new"]
    exact = await store.keys.list_keys(KeyQuery(limit=8))
    assert (len(exact.keys), exact.next) == (8, "")
    assert await listed(store.keys, KeyQuery(limit=1)) == await listed(store.keys)


@pytest.mark.parametrize("after", ["x", "!", "W10=", codec.encode(("1", -1)).hex(), "WyIyIiwzXQ==", "WyIxIiwtMV0=", "A" * 4096])
async def test_a_token_that_is_none_of_ours(store: Store, after: str) -> None:
    with pytest.raises(BadInput):
        await store.keys.list_keys(KeyQuery(after=after))


async def test_what_the_index_finds_is_a_hint(store: Store) -> None:
    """The KMC's index may name too much or lag behind; what a key is, its row says."""
    made = await store.keys.create_many(KeysCreateRequest("AES-256-GCM", ("shop/a", "shop/b", "billing")), actor="a")
    found = [key.id for key in await listed(store.keys, KeyQuery(label="shop/"))]
    assert found == [made[0].id, made[1].id]
    store.consumer.found = (*(key.id for key in made), new_key_id())
    assert [key.id for key in await listed(store.keys, KeyQuery(label="shop/"))] == found
    assert await listed(store.keys, KeyQuery(state="disabled")) == []
    assert await listed(store.keys, KeyQuery(algorithm="Ed25519")) == []
    assert len(await listed(store.keys, KeyQuery(state="enabled", algorithm="AES-256-GCM"))) == 3


async def test_whoever_was_idle_longest_makes_room(world: World, store: Store) -> None:
    made = await store.keys.create_many(KeysCreateRequest("AES-256-GCM", tuple([""] * 50)), actor="a")
    world.card.limit_keys(40)
    uses = [await store.keys.use(key.id) for key in made]
    assert (await describe(store)).keys <= 40
    assert len({use.handle for use in uses}) == 50
    assert await store.encrypt(made[0].id, b"hello")
    with store.keys.hold():
        held = [await store.keys.use(key.id) for key in made[:40]]
        with pytest.raises(LimitReached):
            await store.keys.use(made[45].id)
        for use in held:
            await store.card.submit(Operation.RUN, handle=use.handle, parameters=codec.encode(StreamRequest(Verb.ENCRYPT)), data=b"x")
    assert (await store.keys.use(made[45].id)).version == 1


async def test_a_stream_keeps_its_key(world: World, store: Store) -> None:
    made = await store.keys.create_many(KeysCreateRequest("AES-256-GCM", tuple([""] * 80)), actor="a")
    world.card.limit_keys(40)
    with store.keys.hold():
        use = await store.keys.use(made[0].id)
        begun = await store.card.submit(Operation.BEGIN, handle=use.handle, parameters=codec.encode(StreamRequest(Verb.ENCRYPT)))
        others = [asyncio.create_task(store.encrypt(key.id, b"x"), context=contextvars.Context()) for key in made[1:]]
        outcomes = await asyncio.gather(*others, return_exceptions=True)
        assert all(isinstance(outcome, (bytes, LimitReached)) for outcome in outcomes)  # 79 at once in room for 39
        assert sum(isinstance(outcome, bytes) for outcome in outcomes) >= 39
        done = await store.card.submit(Operation.FINISH, handle=begun.value, data=b"the end")
        assert len(done.data) == 7 + 16


async def test_a_small_cache_serves_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.escrow._cache, "_limit", 4000)
    made = await store.keys.create_many(KeysCreateRequest("AES-256-GCM", tuple([str(n) for n in range(50)])), actor="a")
    assert len(store.escrow._cache) < 20
    assert await listed(store.keys, KeyQuery(limit=7)) == made
    assert len(await asyncio.gather(*(store.encrypt(key.id, b"x") for key in made))) == 50


# -- an escrow that lies -----------------------------------------------------------------------------------------------


def drop_row(consumer: FakeConsumer, key: KeyId) -> None:
    del consumer.rows[key, 1]


def swap_material(consumer: FakeConsumer, key: KeyId) -> None:
    consumer.rows[key, 1] = msgspec.structs.replace(consumer.rows[key, 1], wrapped=bytes(60))


def rewrite_history(consumer: FakeConsumer, key: KeyId) -> None:
    del consumer.log[2:]
    del consumer.rows[key, 0], consumer.rows[key, 1]


def make_foreign(consumer: FakeConsumer, key: KeyId) -> None:
    consumer.rows[key, 1] = msgspec.structs.replace(consumer.rows[key, 1], consumer=consumer.name + "x")


def invent_row(consumer: FakeConsumer, key: KeyId) -> None:
    consumer.rows[key, 9] = msgspec.structs.replace(consumer.rows[key, 1], version=9)
    consumer.unasked.add((key, 9))


Lie = Callable[[FakeConsumer, KeyId], None]
LIES = [
    (drop_row, EscrowRolledBack),
    (swap_material, EscrowRowTampered),
    (rewrite_history, EscrowRolledBack),
    (make_foreign, EscrowRowForeign),
    (invent_row, EscrowRowForeign),
]


@pytest.mark.parametrize(("lie", "error"), LIES)
async def test_an_escrow_that_lies_is_found_before_anything_is_served(world: World, lie: Lie, error: type[CipherfleetError]) -> None:
    store = await world.store()
    for _ in range(2):
        victim = await store.keys.create("AES-256-GCM", label="", actor="a")
    before = Seen(EPOCH, len(store.consumer.log), store.consumer.head())
    lie(store.consumer, victim.id)
    escrow = Escrow(store.consumer.name, store.consumer, world.kmc.signing_key)
    with pytest.raises(error):
        await escrow.load(before)


@pytest.mark.parametrize(("lie", "error"), LIES)
async def test_rows_that_lie_are_refused_until_good_ones_come(world: World, lie: Lie, error: type[CipherfleetError]) -> None:
    store = await world.store()
    first = await store.keys.create("AES-256-GCM", label="", actor="a")
    victim = await store.keys.create("AES-256-GCM", label="", actor="a")
    log, rows = list(store.consumer.log), dict(store.consumer.rows)
    store.escrow._cache.clear()
    store.keys._handles.forget()
    lie(store.consumer, victim.id)
    with pytest.raises(error):
        await store.keys.refresh()  # of a history that was rewritten this is all
        await store.keys.use(victim.id)
    with pytest.raises(error):
        await store.keys.use(first.id)  # fail closed: nothing is served from an escrow that lies
    with pytest.raises(error):
        await store.keys.create("AES-256-GCM", label="", actor="a")
    store.consumer.log, store.consumer.rows = log, rows
    store.consumer.unasked.clear()
    assert (await store.keys.use(first.id)).version == 1
    assert (await store.keys.use(victim.id)).version == 1


@pytest.mark.parametrize(("lie", "error"), LIES)
async def test_a_row_that_lies_far_back_is_found_beside_the_service(world: World, lie: Lie, error: type[CipherfleetError]) -> None:
    """Of a large escrow the first rows alone are looked at before the VCM serves; the others follow."""
    store = await world.store()
    made = [await store.keys.create("AES-256-GCM", label="", actor="a") for _ in range(3)]
    store.consumer.page = 2
    before = Seen(EPOCH, len(store.consumer.log), store.consumer.head())
    victim = max(key.id for key in made)
    lie(store.consumer, victim)
    escrow = Escrow(store.consumer.name, store.consumer, world.kmc.signing_key)

    async def begin() -> None:
        await escrow.load(before)
        await Keys(escrow, store.card).sweep()

    with pytest.raises(error):
        await begin()
    assert not escrow.swept
    with pytest.raises(error):
        await escrow.require() if lie in (swap_material, make_foreign, rewrite_history) else await escrow.sweep_page()


async def test_all_rows_are_looked_at_once(world: World) -> None:
    store = await world.store()
    made = [await store.keys.create("AES-256-GCM", label=str(n), actor="a") for n in range(4)]
    store.consumer.page = 3
    other = await world.store()
    swept, calls = [other.escrow.swept], store.consumer.calls
    await other.keys.sweep()
    swept.append(other.escrow.swept)
    assert swept == [False, True]
    assert calls.count("GET /v1/escrow/rows") == 1 + 3  # the first VCM's, of nothing; eight rows are three pages
    calls.clear()
    assert [key.id for key in await listed(other.keys)] == [key.id for key in made]
    assert calls == []


async def test_rows_that_change_while_they_are_looked_at_are_no_lies(world: World) -> None:
    store = await world.store()
    made = [await store.keys.create("AES-256-GCM", label="", actor="a") for _ in range(3)]
    store.consumer.page = 2
    other = await world.store()
    for key in made:
        await store.keys.set_state(key.id, KeyState.DISABLED, actor="a")
        await store.keys.set_state(key.id, KeyState.ENABLED, actor="a")
        await store.keys.rotate(key.id, actor="a")
    await store.keys.create("AES-256-GCM", label="", actor="a")
    await other.keys.sweep()
    assert [(await other.keys.describe(key.id)).version for key in made] == [2, 2, 2]


async def test_rows_come_back_in_order_or_not_at_all(world: World) -> None:
    store = await world.store()
    for _ in range(3):
        await store.keys.create("AES-256-GCM", label="", actor="a")

    def backwards(reply: object) -> object:
        return RowsReply(reply.rows[::-1], reply.end) if isinstance(reply, RowsReply) else reply

    def again(reply: object) -> object:
        return RowsReply(reply.rows[:1]) if isinstance(reply, RowsReply) else reply

    seen = Seen(EPOCH, 0, genesis(store.consumer.name, EPOCH))
    with pytest.raises(EscrowRowTampered):
        await Escrow(world.consumer.name, Liar(world.consumer, backwards), world.kmc.signing_key).load(seen)
    escrow = Escrow(world.consumer.name, Liar(world.consumer, again), world.kmc.signing_key)
    await escrow.load(seen)
    store.consumer.page = 1
    store.consumer.rows = dict(sorted(store.consumer.rows.items())[:1])
    with pytest.raises(EscrowRolledBack):  # the end comes too early
        await escrow.sweep_page()


async def test_a_refresh_asks_for_what_is_new_alone(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await world.store()
    for _ in range(3):
        await other.keys.create("AES-256-GCM", label="", actor="a")
    sent: list[int] = []
    page = store.consumer.log_page

    def noted(after: int) -> LogPage:
        answer = page(after)
        sent.append(len(answer.log))
        return answer

    monkeypatch.setattr(store.consumer, "log_page", noted)
    await store.keys.refresh()
    await store.keys.refresh()
    assert sent == [6, 0]
    store.consumer.page = 2
    for _ in range(3):
        await other.keys.create("AES-256-GCM", label="", actor="a")
    sent.clear()
    await store.keys.refresh()
    assert sent == [2, 2, 2]
    assert store.escrow.seen == Seen(EPOCH, 12, store.consumer.head())


async def test_a_log_without_an_end_is_none(world: World) -> None:
    def endless(page: object) -> object:
        return LogPage(page.log) if isinstance(page, LogPage) else page

    escrow = Escrow(world.consumer.name, Liar(world.consumer, endless), world.kmc.signing_key)
    with pytest.raises(EscrowRolledBack):
        await escrow.load(Seen(EPOCH, 0, world.consumer.head()))


async def test_a_row_that_fits_the_log_but_not_the_card_is_refused(store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    row = store.consumer.rows[made.id, 0]
    attributes = msgspec.structs.replace(decode_attributes(row), state=KeyState.DELETED, previous=row_digest(row))
    forged = msgspec.structs.replace(row, attributes=codec.encode(attributes))
    store.consumer.rows[made.id, 0] = forged
    store.consumer.append(forged.subject, row_digest(forged))
    await store.keys.refresh()
    with pytest.raises(EscrowRowTampered):
        await store.keys.use(made.id)


async def test_an_old_row_written_again_is_a_rollback(world: World, store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    old = store.consumer.rows[made.id, 0]
    await store.keys.set_state(made.id, KeyState.DISABLED, actor="a")
    store.consumer.rows[made.id, 0] = old
    store.consumer.append(old.subject, row_digest(old))
    with pytest.raises(EscrowRolledBack):
        await store.keys.refresh()
    with pytest.raises(EscrowRolledBack):
        await world.store()  # one that never saw the newer row finds it, too


async def test_a_row_that_was_kept_back_is_a_rollback(world: World, store: Store) -> None:
    """The operator refuses a write, keeps the sealed row, and appends it with its HSM after the next one."""
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    await store.keys.set_state(made.id, KeyState.DISABLED, actor="a")
    disabled = store.consumer.rows[made.id, 0]
    enabled = KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 3, 0.0)
    kept_back = await store.keys.seal(made.id, enabled, disabled)
    await store.keys.destroy(made.id, actor="a")
    for row in (disabled, kept_back):
        store.consumer.rows[made.id, 0] = row
        store.consumer.append(row.subject, row_digest(row))
    with pytest.raises(EscrowRolledBack):
        await store.keys.refresh()
    store.consumer.log.pop(-2)
    store.consumer.log[-1] = msgspec.structs.replace(store.consumer.log[-1], sequence=len(store.consumer.log))
    with pytest.raises(EscrowRolledBack):
        await store.keys.refresh()


async def test_a_changed_key_names_the_row_it_replaces(store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    rows = [store.consumer.rows[made.id, 0]]
    await store.keys.rotate(made.id, actor="a")
    rows.append(store.consumer.rows[made.id, 0])
    await store.keys.set_state(made.id, KeyState.DISABLED, actor="a")
    rows.append(store.consumer.rows[made.id, 0])
    previous = [attributes.previous for attributes in map(decode_attributes, rows) if isinstance(attributes, KeyAttributes)]
    assert previous == [b"", row_digest(rows[0]), row_digest(rows[1])]
    await store.keys.refresh()


async def test_a_shared_look_that_fails_fails_for_all(store: Store) -> None:
    """Four callers at once: none of them may take the failure of the look that they waited for as its success."""
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    store.consumer.append("key/nobody/1", b"x" * 32)
    with pytest.raises(EscrowRolledBack):
        await store.escrow.refresh()
    store.consumer.calls.clear()
    outcomes = await asyncio.gather(*(store.escrow.require() for _ in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EscrowRolledBack] * 4
    assert store.consumer.calls == ["GET /v1/escrow"]
    uses = await asyncio.gather(*(store.keys.use(made.id) for _ in range(4)), return_exceptions=True)
    assert [type(use) for use in uses] == [EscrowRolledBack] * 4
    store.consumer.log.pop()
    assert await asyncio.gather(*(store.escrow.require() for _ in range(4))) == [None] * 4


async def test_attributes_of_an_older_revision_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    await store.keys.rotate(made.id, actor="a")
    newest = store.consumer.rows[made.id, 0]
    older = await store.keys.seal(made.id, KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 0.0), newest)
    store.consumer.rows[made.id, 0] = older
    store.consumer.append(older.subject, row_digest(older))
    await store.keys.refresh()
    with pytest.raises(EscrowRowTampered):
        await store.keys.use(made.id)


async def test_a_key_without_attributes_is_refused(store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    material = msgspec.structs.replace(store.consumer.rows[made.id, 1], key=new_key_id())
    store.consumer.rows[material.key, 1] = material
    store.consumer.append(material.subject, row_digest(material))
    with pytest.raises(EscrowRowTampered):
        await store.keys.use(material.key)


class Liar:
    """Between the VCM and the escrow: changes what comes back."""

    def __init__(self, consumer: FakeConsumer, change: Callable[[object], object]) -> None:
        self._consumer, self._change = consumer, change

    async def call(self, method: str, path: str, body: object | None = None, *, reply: type[T]) -> T:
        changed = self._change(await self._consumer.call(method, path, body, reply=reply))
        assert isinstance(changed, reply)
        return changed


def _other_checkpoint(consumer: str, *, key: bool = True) -> Callable[[object], object]:
    def change(view: object) -> object:
        assert isinstance(view, LogPage)
        signer = new_key() if key else KMC[0].key
        statement = CheckpointStatement(consumer, EPOCH, 0, b"h" * 32)  # type: ignore[arg-type]
        return msgspec.structs.replace(view, checkpoint=signed(statement, signer))

    return change


KMC: list[FakeKmc] = []


@pytest.mark.parametrize(("consumer", "forged"), [("acme", True), ("rival", False)])
async def test_a_checkpoint_of_another_signer_or_consumer_is_forged(world: World, consumer: str, forged: bool) -> None:
    KMC[:] = [world.kmc]
    liar = Liar(world.consumer, _other_checkpoint(consumer, key=forged))
    with pytest.raises(CheckpointForged):
        await Escrow(world.consumer.name, liar, world.kmc.signing_key).load(Seen(EPOCH, 0, world.consumer.head()))


async def test_another_epoch_than_the_ukeys_is_a_rollback(world: World) -> None:
    escrow = Escrow(world.consumer.name, world.consumer, world.kmc.signing_key)
    with pytest.raises(EscrowRolledBack):
        await escrow.load(Seen(EPOCH + 1, 0, world.consumer.head()))


def _cut(receipt: object) -> object:
    return EscrowReceipt(receipt.log[:1]) if isinstance(receipt, EscrowReceipt) else receipt


def _other_digest(receipt: object) -> object:
    if not isinstance(receipt, EscrowReceipt):
        return receipt
    return EscrowReceipt((msgspec.structs.replace(receipt.log[0], digest=b"x" * 32), *receipt.log[1:]))


@pytest.mark.parametrize("change", [_cut, _other_digest])
async def test_a_receipt_for_something_else_is_no_acknowledgement(world: World, change: Callable[[object], object]) -> None:
    store = await world.store()
    escrow = Escrow(world.consumer.name, Liar(world.consumer, change), world.kmc.signing_key)
    await escrow.load(Seen(EPOCH, 0, world.consumer.head()))
    with pytest.raises(EscrowRowTampered):
        await Keys(escrow, store.card).create("AES-256-GCM", label="", actor="a")


# -- a key's terms, on two VCMs ----------------------------------------------------------------------------------------


async def test_two_vcms_together_never_use_a_key_too_often(world: World, store: Store) -> None:
    other = await world.store()
    made = await store.keys.create("AES-256-GCM", label="", actor="a", terms=KeyTerms(max_uses=10))
    uses = [vcm.keys.use(made.id, protects=True) for _ in range(8) for vcm in (store, other)]
    answers = await asyncio.gather(*uses, return_exceptions=True)
    spent = [answer for answer in answers if isinstance(answer, KeyUsesSpent)]
    assert len(answers) - len(spent) == 10, answers
    fresh = await world.store()  # what the others reserved is in the escrow, whatever becomes of them
    with pytest.raises(KeyUsesSpent):
        await fresh.keys.use(made.id, protects=True)
    assert (await fresh.keys.use(made.id)).version == 1


async def test_without_the_escrow_no_counted_use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a", terms=KeyTerms(max_uses=10))

    async def unreachable(*_: object, **__: object) -> object:
        raise KmcUnavailable("gone")

    monkeypatch.setattr(store.consumer, "call", unreachable)
    with pytest.raises(KmcUnavailable):
        await store.keys.use(made.id, protects=True)


async def test_of_two_vcms_one_does_what_is_due(world: World, store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a", terms=KeyTerms(rotation_s=10))
    dying = await store.keys.create("AES-256-GCM", label="", actor="a")
    at = time.time() + 8 * DAY_S
    await KeyLife(store.keys, store.escrow, Settings()).schedule_deletion(dying.id, 7, actor="a")
    vcms = [store, await world.store(), await world.store()]
    for vcm in vcms:
        vcm.keys._wall_clock = lambda: at
    await asyncio.gather(*(Chores(vcm.keys, 1, lambda: at).look() for vcm in vcms))
    for vcm in vcms:
        await vcm.keys.refresh()
        assert (await vcm.keys.describe(made.id)).versions == (1, 2)
        assert (await vcm.keys.describe(dying.id)).state == "deleted"
    events = [subject for subject in (entry.subject for entry in store.consumer.log) if subject == f"key/{dying.id}/0"]
    assert len(events) == 3  # made, scheduled, destroyed: once
    late = await world.store()
    while not late.escrow.swept:
        await late.keys.sweep()  # material that is rightly gone is not missed


async def test_material_that_is_gone_without_being_destroyed_is_missed(world: World, store: Store) -> None:
    made = await store.keys.create("AES-256-GCM", label="", actor="a")
    del store.consumer.rows[made.id, 1]
    with pytest.raises(EscrowRolledBack):
        await (await world.store()).keys.sweep()
