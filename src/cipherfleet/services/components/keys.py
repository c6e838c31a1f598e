"""Create, import, list, show, rotate, enable, disable and delete keys."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec

from cipherfleet.channel import codec
from cipherfleet.channel.server import Call
from cipherfleet.contract.algorithms import Kind, Use, algorithm
from cipherfleet.contract.errors import Malformed, ServiceUnavailable, TooLarge, WrongKeyType
from cipherfleet.contract.escrow import KeyState
from cipherfleet.contract.key_life import check_label, tag_term
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import CardDescription, Operation
from cipherfleet.contract.vcm_api import (
    MAX_KEYS_AT_ONCE,
    ImportTarget,
    KeyCreateRequest,
    KeyDeriveRequest,
    KeyDescription,
    KeyImportRequest,
    KeyListReply,
    KeyQuery,
    KeysCreateRequest,
    KeysImportRequest,
    keys_at_once,
)
from cipherfleet.services import wire
from cipherfleet.services.components.bodies import header_version, whole_number
from cipherfleet.services.components.routes import Routes, actor

MAX_TAGS_ASKED = 16
_STATES = {"enable": KeyState.ENABLED, "disable": KeyState.DISABLED}


class Keys:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/keys", (Right.CREATE,), self.create)
        routes.add("POST", "/v1/keys/{key}/derive-key", (Right.DERIVE, Right.CREATE), self.derive)
        routes.add("GET", "/v1/keys", (Right.SHOW,), self.list_keys)
        routes.add("POST", "/v1/keys/batch", (Right.CREATE,), self.create_many)
        routes.add("POST", "/v1/import/batch", (Right.CREATE,), self.import_many)
        routes.add("GET", "/v1/import", (Right.CREATE,), self.import_target)
        routes.add("POST", "/v1/import", (Right.CREATE,), self.import_key)
        routes.add("GET", "/v1/keys/{key}", (Right.SHOW,), self.describe)
        routes.add("POST", "/v1/keys/{key}/rotate", (Right.MANAGE,), self.rotate)
        for verb, state in _STATES.items():
            routes.add("POST", f"/v1/keys/{{key}}/{verb}", (Right.MANAGE,), self._setter(state))

    async def create(self, call: Call) -> KeyDescription:
        """It is acknowledged after the escrow has it."""
        request = await self._routes.body(call).message(KeyCreateRequest)
        return await self._routes.host.keys.create(
            _check(request), label=request.label, actor=actor(call), bare=request.bare, terms=request.terms, tags=request.tags
        )

    async def derive(self, call: Call) -> KeyDescription:
        """It is acknowledged after the escrow has it."""
        request = await self._routes.body(call).message(KeyDeriveRequest)
        source = await self._routes.key_use(call, Use.DERIVE, version=header_version(call.request), protects=True)
        return await self._routes.host.keys.derive(
            source,
            _check(request),
            request.context,
            request.salt,
            label=request.label,
            actor=actor(call),
            bare=request.bare,
            terms=request.terms,
        )

    async def import_target(self, call: Call) -> ImportTarget:
        card = self._routes.host.card
        described = codec.decode((await card.submit(Operation.DESCRIBE)).parameters, CardDescription)
        return ImportTarget(described.vcm, described.card, (await card.submit(Operation.TRANSPORT)).data)

    async def import_key(self, call: Call) -> KeyDescription:
        """The material passes through here sealed to the card."""
        request = await self._routes.body(call).message(KeyImportRequest)
        _check(request)
        return await self._routes.host.keys.import_key(request, actor=actor(call))

    async def create_many(self, call: Call) -> KeyListReply:
        """All of them, or none."""
        request = await self._routes.body(call).message(KeysCreateRequest)
        _check_count(len(request.labels))
        for label in dict.fromkeys(request.labels):
            _check(KeyCreateRequest(request.algorithm, label, request.bare))
        chosen = algorithm(request.algorithm)
        if len(request.labels) > keys_at_once(chosen):
            raise TooLarge(
                f"a batch makes at most {keys_at_once(chosen)} keys of {chosen.name}, which take long", "make them in several batches"
            )
        made = await self._routes.host.keys.create_many(request, actor=actor(call))
        return KeyListReply(tuple(made))

    async def import_many(self, call: Call) -> KeyListReply:
        """All of them, or none."""
        request = await self._routes.body(call).message(KeysImportRequest, limit=wire.MAX_BATCH_BYTES)
        _check_count(len(request.keys))
        for key in request.keys:
            _check(key)
        return KeyListReply(tuple(await self._routes.host.keys.import_many(request.keys, actor=actor(call))))

    async def list_keys(self, call: Call) -> KeyListReply:
        """A page of keys: ``?limit=&after=&label=&state=&algorithm=&tag=NAME=VALUE``, the last as often as wanted."""
        for name in call.request.query:
            if name not in ("limit", "after", "label", "state", "algorithm", "tag"):
                raise Malformed(f"keys are not listed by {name[:80]!r}")
        state, name = call.query("state"), call.query("algorithm")
        if state and state not in tuple(KeyState):
            raise Malformed(f"a key is {', '.join(KeyState)}")
        tags = [text.partition("=") for text in call.request.query.getall("tag", [])]
        if len(tags) > MAX_TAGS_ASKED or not all(between for _, between, _ in tags):
            raise Malformed(f"a tag is asked for as NAME=VALUE, at most {MAX_TAGS_ASKED} at once")
        query = KeyQuery(
            terms=tuple(tag_term(tag, value) for tag, _, value in tags),
            label=call.query("label"),
            state=state,
            algorithm=algorithm(name).name if name else "",
            after=call.query("after"),
            limit=whole_number(call.query("limit", "100"), "limit", 1, MAX_KEYS_AT_ONCE),
        )
        if len(query.label) > wire.MAX_LABEL_CHARACTERS:
            raise Malformed(f"a label has at most {wire.MAX_LABEL_CHARACTERS} characters")
        return await self._routes.host.keys.list_keys(query)

    async def describe(self, call: Call) -> KeyDescription:
        """With its last use, if the KMC says."""
        described = await self._routes.host.keys.describe(await self._routes.key_id(call))
        with suppress(ServiceUnavailable):
            used = await self._routes.host.usage(described.id)
            described = msgspec.structs.replace(described, last_used_at=used.last_used_at, uses_counted=used.uses)
        return described

    async def rotate(self, call: Call) -> KeyDescription:
        return await self._routes.host.keys.rotate(await self._routes.key_id(call), actor=actor(call))

    def _setter(self, state: KeyState) -> Callable[[Call], Awaitable[KeyDescription]]:
        async def set_state(call: Call) -> KeyDescription:
            return await self._routes.host.keys.set_state(await self._routes.key_id(call), state, actor=actor(call))

        return set_state


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_KEYS_AT_ONCE:
        raise Malformed(f"a batch has 1 to {MAX_KEYS_AT_ONCE} keys, not {count}")


def _check(request: KeyCreateRequest | KeyImportRequest | KeyDeriveRequest) -> str:
    """The algorithm's name. Raises ``AlgorithmUnknown``, ``WrongKeyType`` or ``Malformed``."""
    chosen = algorithm(request.algorithm)
    if chosen.kind is Kind.DIGEST:
        raise WrongKeyType(f"{chosen.name} is a digest, it has no keys")
    if request.bare and chosen.kind is not Kind.AEAD and not chosen.bare_only:
        raise WrongKeyType(f"a key of {chosen.name} encrypts nothing, so it cannot be bare")
    check_label(request.label)
    return chosen.name
