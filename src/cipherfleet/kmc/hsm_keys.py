"""Keys that stay in the HSM, in the shapes that others want: a signer of statements, a private key that signs certificates."""

import asyncio
from typing import Any, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cipherfleet.contract.errors import HsmUnavailable
from cipherfleet.kmc.hsm import Hsm, KeyHandle

SIGN_TIMEOUT_S = 30.0


class HsmSigner:
    """A ``channel.signing.Signer`` whose key is in the HSM."""

    def __init__(self, hsm: Hsm, handle: KeyHandle, public_key: bytes) -> None:
        self._hsm, self._handle = hsm, handle
        self.public_key = public_key

    async def sign(self, data: bytes) -> bytes:
        return await self._hsm.sign(self._handle, data)


class HsmPrivateKey(ec.EllipticCurvePrivateKey):
    """What ``CertificateBuilder.sign`` takes for a private key, while the HSM signs.

    ``sign`` blocks, so it is for a thread beside the loop that talks to the HSM (``asyncio.to_thread``).
    """

    def __init__(self, hsm: Hsm, handle: KeyHandle, public_key: bytes, loop: asyncio.AbstractEventLoop) -> None:
        loaded = load_der_public_key(public_key)
        if not isinstance(loaded, ec.EllipticCurvePublicKey):
            raise HsmUnavailable("the HSM answered with a key of another kind")
        self._hsm, self._handle, self._public, self._loop = hsm, handle, loaded, loop

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        if isinstance(signature_algorithm.algorithm, utils.Prehashed) or signature_algorithm.algorithm.name != hashes.SHA256.name:
            self._stays()
        return asyncio.run_coroutine_threadsafe(self._hsm.sign(self._handle, bytes(data)), self._loop).result(SIGN_TIMEOUT_S)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> NoReturn:
        self._stays()

    def private_numbers(self) -> NoReturn:
        self._stays()

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> NoReturn:  # noqa: A002 - its name upstream
        self._stays()

    def __copy__(self) -> "HsmPrivateKey":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "HsmPrivateKey":
        return self

    @staticmethod
    def _stays() -> NoReturn:
        raise RuntimeError("a key of the HSM signs with SHA-256 and does nothing else here")
