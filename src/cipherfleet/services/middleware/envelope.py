"""The client's own cryptography: key material on its way into a card, sealed so that only the card can open it."""

import base64
from collections.abc import Iterable
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from cipherfleet.channel import codec
from cipherfleet.channel.sealing import check_card, import_info
from cipherfleet.contract.algorithms import algorithm
from cipherfleet.contract.errors import CardUntrusted, KeyMaterialInvalid
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.vcc import KeyMaterial
from cipherfleet.contract.vcm_api import ImportTarget

_PEM = b"-----BEGIN"


class NewKey(NamedTuple):
    """A key of one's own: ``material`` is raw bytes of a symmetric key, PKCS#8 (PEM or DER, unencrypted) of a private one."""

    algorithm: str
    material: bytes
    label: str = ""
    bare: bool = False
    terms: KeyTerms = NO_TERMS
    tags: dict[str, str] = {}  # noqa: RUF012 - never changed


def seal_material(profile: Profile, target: ImportTarget, name: str, material: bytes) -> bytes:
    """``material`` for a key of the algorithm ``name``, sealed to the card that ``target`` shows.

    Raises ``CardUntrusted``, ``KeyMaterialInvalid`` or ``AlgorithmUnknown``.
    """
    [sealed] = seal_keys(profile, target, (NewKey(name, material),))
    return sealed


def seal_keys(profile: Profile, target: ImportTarget, keys: Iterable[NewKey]) -> list[bytes]:
    """Each sealed on its own, as ``seal_material`` does it; the card is checked once."""
    if not profile.root:
        raise CardUntrusted("the profile does not name the CA of the cards", "sign the application in again: cipherfleet app add")
    card, info = check_card(target.chain, profile.root.encode(), target.card), import_info(target.card, target.vcm)
    sealed = []
    for key in keys:
        raw = _to_der(key.material) if key.material.lstrip().startswith(_PEM) else key.material
        sealed.append(card.seal(codec.encode(KeyMaterial(profile.consumer, algorithm(key.algorithm).name, raw)), info))
    return sealed


def _to_der(pem: bytes) -> bytes:
    lines = pem.strip().splitlines()
    try:
        if lines[0].strip() == _PEM + b" PRIVATE KEY-----":  # PKCS#8 already, perhaps of a curve that only the card knows
            return base64.b64decode(b"".join(line.strip() for line in lines[1:-1]), validate=True)
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise KeyMaterialInvalid("the private key cannot be read", "give PKCS#8 as PEM or DER, unencrypted") from exc
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
