"""A card's operations on keys: making and bringing them, loading them by handle, letting them out where they may."""

from collections.abc import Callable

import msgspec

from cipherfleet.channel import codec
from cipherfleet.channel.sealing import import_info
from cipherfleet.computing import engine, engine_transfer, engine_wrap
from cipherfleet.computing.card_chain import KeyChain
from cipherfleet.computing.card_lease import Lease
from cipherfleet.computing.card_request import Answer, Request, Work, parameters
from cipherfleet.computing.card_tables import KeyTable, StreamTable
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_memory import wipe
from cipherfleet.computing.engine_stream import derived
from cipherfleet.contract import policy
from cipherfleet.contract.algorithms import Algorithm, Kind, algorithm
from cipherfleet.contract.errors import (
    ImportTokenExpired,
    ImportTokenInvalid,
    KeyExpired,
    KeyNotExportable,
    Malformed,
    SealedForeign,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.escrow import Attributes, EscrowRow, VersionAttributes, decode_attributes
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.policy import Policy
from cipherfleet.contract.vcc import (
    DeriveKeyRequest,
    ExportRequest,
    ImportKey,
    ImportKeyRequest,
    ImportRequest,
    ImportWrappedRequest,
    KeyMaterial,
    Operation,
    RowRequest,
    StreamRequest,
    Verb,
)

MAX_ATTRIBUTE_BYTES = 64 * 1024


class Permit:
    """What the policy of the lease in force and a key's own term say of using it."""

    def __init__(self, lease: Lease, wall_clock: Callable[[], float]) -> None:
        self._lease, self.wall_clock = lease, wall_clock

    @property
    def policy(self) -> Policy:
        return self._lease.policy

    def check(self, key: Key, *, protect: bool = True) -> None:
        """Raises ``PolicyRefused`` or ``KeyExpired``."""
        if protect and key.not_after and self.wall_clock() >= key.not_after:
            raise KeyExpired(f"key {key.id} has expired")
        age_s = self.wall_clock() - key.created_at
        policy.check(self._lease.policy, key.algorithm, protect=protect, bare=key.bare, imported=key.imported, age_s=age_s)


class KeyOperations:
    """Those of one vCC. ``names``: for whom it is and where; ``chain``: the consumer's key chain, or raises why there is none."""

    def __init__(
        self,
        names: tuple[ConsumerId, CardId, VcmId],
        transport: engine_wrap.TransportKeys,
        chain: Callable[[], KeyChain],
        permit: Permit,
        keys: KeyTable,
        streams: StreamTable,
    ) -> None:
        self._consumer, self._card, self._vcm = names
        self._transport, self._chain, self._permit = transport, chain, permit
        self._keys, self._streams = keys, streams
        self.operations: dict[int, Callable[[Request], Answer | Work]] = {
            Operation.GENERATE: self._generate,
            Operation.IMPORT: self._import,
            Operation.DERIVE_KEY: self._derive_key,
            Operation.IMPORT_KEY: self._import_key,
            Operation.IMPORT_WRAPPED: self._import_wrapped,
            Operation.EXPORT: self._export,
            Operation.LOAD: self._load,
            Operation.UNLOAD: self._unload,
            Operation.SEAL_ATTRIBUTES: self._seal_attributes,
            Operation.VERIFY_ATTRIBUTES: self._verify_attributes,
        }

    def _generate(self, request: Request) -> Answer | Work:
        row = parameters(request, RowRequest)
        attributes, chosen = self._wanted(row)
        return self._make(row, attributes, chosen, lambda: engine.generate_material(chosen))

    def _import(self, request: Request) -> Answer | Work:
        """Key material that an application sealed to this card; the VCM that brings it cannot read it."""
        row, sealed = msgspec.structs.astuple(parameters(request, ImportRequest))
        attributes, chosen = self._wanted(row, imported=True)
        plaintext = self._transport.open_sealed(sealed, import_info(self._card, self._vcm))
        try:
            brought = codec.decode(plaintext, KeyMaterial, what="the sealed key material")
        finally:
            wipe(plaintext)
        if brought.consumer != self._consumer or brought.algorithm != chosen.name:
            wipe(brought.material)
            raise SealedForeign("the key material was sealed for another consumer or algorithm")
        return self._make(row, attributes, chosen, lambda: engine.check_material(chosen, brought.material))

    def _derive_key(self, request: Request) -> Answer | Work:
        """A key that another one gives, the same each time; nobody sees it."""
        asked = parameters(request, DeriveKeyRequest)
        attributes, chosen = self._wanted(asked.row)
        source = self._keys.get(asked.source)
        self._permit.check(source)
        if not chosen.secret_key:
            raise WrongKeyType(f"a key of {chosen.name} cannot be derived", "choose a symmetric algorithm")
        info = b"cipherfleet derived key v1|" + chosen.name.encode() + b"|" + asked.context
        material = derived(StreamRequest(Verb.DERIVE, info, length=chosen.key_bits // 8, salt=asked.salt), source)
        return self._make(asked.row, attributes, chosen, lambda: material)

    def _import_key(self, request: Request) -> Work:
        """step one of bringing a key: whoever has the token can import one key, under the id in it."""
        asked = parameters(request, ImportKeyRequest)
        algorithm(asked.token.algorithm)

        def keep(private: bytearray) -> Answer:
            try:
                token = engine_transfer.seal_token(self._chain().wrapping, self._consumer, asked.token, private)
                return Answer(parameters=codec.encode(ImportKey(token, engine_transfer.public_half(private))))
            finally:
                wipe(private)

        return Work(lambda _: engine_transfer.new_import_key(asked.bits), keep, alone=True, lasting=True)

    def _import_wrapped(self, request: Request) -> Answer | Work:
        row, token, wrapped = msgspec.structs.astuple(parameters(request, ImportWrappedRequest))
        attributes, chosen = self._wanted(row, imported=True)
        private = engine_transfer.open_token(self._chain().wrapping, self._consumer, token)
        if self._permit.wall_clock() >= token.expires_at:
            wipe(private)
            raise ImportTokenExpired("the import token has expired")
        if (row.key, row.version, chosen.name, attributes.bare) != (token.key, 1, token.algorithm, token.bare):
            wipe(private)
            raise ImportTokenInvalid("the import token is for another key")
        material = engine_transfer.unwrap(private, wrapped)
        return self._make(row, attributes, chosen, lambda: engine.check_material(chosen, material))

    def _export(self, request: Request) -> Answer:
        asked = parameters(request, ExportRequest)
        key = self._keys.get(request.handle)
        if not key.exportable:
            raise KeyNotExportable(f"key {key.id} was not made to leave the card")
        self._permit.check(key)
        if bool(asked.public_key) == bool(asked.wrapping):
            raise Malformed("a key is exported to a public key, or under a wrap key")
        if asked.public_key:
            return Answer(data=engine_transfer.wrap_to(asked.public_key, key))
        wrapping = self._keys.get(asked.wrapping)
        self._permit.check(wrapping)
        return Answer(data=engine_transfer.wrap_under(wrapping, key))

    def _wanted(self, row: RowRequest, *, imported: bool = False) -> tuple[VersionAttributes, Algorithm]:
        """What a new version shall be."""
        self._keys.check_room()
        attributes = _version_attributes(EscrowRow(self._consumer, row.key, row.version, row.attributes, b""))
        chosen = algorithm(attributes.algorithm)
        if chosen.kind is Kind.DIGEST:
            raise WrongKeyType(f"there are no keys of {chosen.name}")
        if attributes.bare and chosen.kind is not Kind.AEAD and not chosen.bare_only:
            raise WrongKeyType(f"a key of {chosen.name} encrypts nothing, so it cannot be bare")
        bare = attributes.bare or chosen.bare_only
        policy.check(self._permit.policy, chosen, bare=bare, imported=imported)
        made_at = min(attributes.created_at, self._permit.wall_clock())  # never in the future, where its age would begin late
        return msgspec.structs.replace(attributes, imported=imported, bare=bare, created_at=made_at), chosen

    def _make(self, row: RowRequest, attributes: VersionAttributes, chosen: Algorithm, material: Callable[[], bytearray]) -> Answer | Work:
        def keep(made: bytearray) -> Answer:
            try:
                self._keys.check_room()
                whole = msgspec.structs.replace(attributes, algorithm=chosen.name, public_key=engine.public_key(chosen, made))
                wrapping = self._chain().wrapping
                wrapped = engine_wrap.wrap(wrapping, self._consumer, row.key, row.version, codec.encode(whole), made)
            except BaseException:
                wipe(made)
                raise
            key = Key(row.key, row.version, chosen, made, whole)
            return Answer(value=self._keys.add(key), parameters=codec.encode(wrapped))

        return Work(lambda _: material(), keep, alone=True, lasting=True) if engine.is_slow(chosen) else keep(material())

    def _load(self, request: Request) -> Answer:
        row = parameters(request, EscrowRow)
        self._keys.check_room()
        material = engine_wrap.unwrap(self._chain().wrapping, self._consumer, row)
        try:
            attributes = _version_attributes(row)
            chosen = algorithm(attributes.algorithm)
        except BaseException:
            wipe(material)
            raise
        return Answer(value=self._keys.add(Key(row.key, row.version, chosen, material, attributes)))

    def _unload(self, request: Request) -> Answer:
        self._streams.end_those_of(request.handle)
        self._keys.remove(request.handle)
        return Answer()

    def _seal_attributes(self, request: Request) -> Answer:
        row = parameters(request, RowRequest)
        if row.version != 0:
            raise Malformed("attributes of a key as a whole are row version 0")
        _attributes(EscrowRow(self._consumer, row.key, row.version, row.attributes, b""))
        sealed = engine_wrap.wrap(self._chain().wrapping, self._consumer, row.key, 0, row.attributes, bytearray())
        return Answer(parameters=codec.encode(sealed))

    def _verify_attributes(self, request: Request) -> Answer:
        row = parameters(request, EscrowRow)
        if row.version != 0:
            raise Malformed("attributes of a key as a whole are row version 0")
        wipe(engine_wrap.unwrap(self._chain().wrapping, self._consumer, row))
        return Answer()


def _attributes(row: EscrowRow) -> Attributes:
    if len(row.attributes) > MAX_ATTRIBUTE_BYTES:
        raise TooLarge(f"attributes have at most {MAX_ATTRIBUTE_BYTES} bytes")
    return decode_attributes(row)


def _version_attributes(row: EscrowRow) -> VersionAttributes:
    attributes = _attributes(row)
    if not 1 <= row.version < 2**32 or not isinstance(attributes, VersionAttributes):
        raise Malformed("key material has a version of 1 or more, and the attributes of one version")
    return attributes
