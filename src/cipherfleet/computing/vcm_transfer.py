"""Keys that come and go wrapped: import by a one-time key and its token, export of keys that were made for it."""

import time
from collections.abc import Callable

from cipherfleet.channel import codec
from cipherfleet.computing.vcm_keys import Keys
from cipherfleet.contract.algorithms import Kind, algorithm
from cipherfleet.contract.errors import ImportTokenInvalid, Malformed, WrongKeyType
from cipherfleet.contract.ids import KeyId, new_key_id
from cipherfleet.contract.key_life import check_label, check_terms
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import ExportRequest, ImportKey, ImportKeyRequest, ImportToken, Operation, VirtualCryptoCard
from cipherfleet.contract.vcm_api import ExportReply, ImportParameters, ImportParametersRequest, KeyDescription, WrappedImportRequest

RSA_WRAP, KWP = "RSA_AES_KEY_WRAP_SHA_256", "AES-256-KWP"


class Transfer:
    def __init__(self, keys: Keys, card: VirtualCryptoCard, settings: Settings, wall_clock: Callable[[], float] = time.time) -> None:
        self._keys, self._card, self._settings, self._wall_clock = keys, card, settings, wall_clock

    async def import_parameters(self, wanted: ImportParametersRequest) -> ImportParameters:
        """Nothing is stored: the token has the import key in it, sealed. Raises ``AlgorithmUnknown``, ``WrongKeyType`` or ``Malformed``."""
        chosen = algorithm(wanted.algorithm)
        if chosen.kind is Kind.DIGEST:
            raise WrongKeyType(f"{chosen.name} is a digest, it has no keys")
        bare = wanted.bare or chosen.bare_only
        token = ImportToken(new_key_id(), chosen.name, bare, self._wall_clock() + self._settings.import_token_s)
        asked = codec.encode(ImportKeyRequest(token, wanted.bits))
        made = codec.decode((await self._card.submit(Operation.IMPORT_KEY, parameters=asked)).parameters, ImportKey)
        return ImportParameters(token.key, chosen.name, made.public_key, codec.encode(made.token), token.expires_at)

    async def import_wrapped(self, request: WrappedImportRequest, *, actor: str) -> KeyDescription:
        """Raises ``ImportTokenInvalid``, ``ImportTokenExpired``, ``ImportTokenUsed`` or ``KeyMaterialInvalid``."""
        check_label(request.label)
        try:
            token = codec.decode(request.token, ImportToken, what="the import token")
        except Malformed as exc:
            raise ImportTokenInvalid("this is no import token") from exc
        return await self._keys.import_by_token(token, request.wrapped, label=request.label, actor=actor, terms=check_terms(request.terms))

    async def export(self, key: KeyId, version: int | None, *, public_key: bytes, wrapping: KeyId | None) -> ExportReply:
        """Raises ``KeyNotExportable``, ``WrongKeyType``, ``PublicKeyInvalid`` or what ``Keys.use`` raises."""
        use = await self._keys.use(key, version=version)
        if bool(public_key) == (wrapping is not None):
            raise Malformed("a key is exported to a public key, or under a wrap key")
        handle = 0 if wrapping is None else (await self._keys.use(wrapping, protects=True)).handle
        asked = codec.encode(ExportRequest(public_key, handle))
        done = await self._card.submit(Operation.EXPORT, handle=use.handle, parameters=asked)
        return ExportReply(key, use.version, use.algorithm, KWP if handle else RSA_WRAP, done.data)
