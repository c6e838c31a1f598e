"""What a card meets: a consumer with a Ukey, the KMC's signing key, and a clock that a test moves."""

import json
import secrets
from functools import cache

import msgspec
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, padding, rsa, x25519

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import fingerprint, public_key_der
from cipherfleet.channel.sealing import TrustedCard, import_info
from cipherfleet.computing import engine_wrap
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_request import Answer
from cipherfleet.computing.engine import Key, generate_material
from cipherfleet.computing.engine_wrap import TransportKeys
from cipherfleet.contract.algorithms import algorithm
from cipherfleet.contract.escrow import EscrowRow, KeyAttributes, KeyState, VersionAttributes
from cipherfleet.contract.ids import CardId, ConsumerId, KeyId, VcmId, new_key_id
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.statements import LeaseStatement, SealedShare, Signature, Signed, Statement, signing_input
from cipherfleet.contract.vcc import CmkDelivery, ImportRequest, KeyMaterial, Operation, RowRequest, StreamRequest

CARD = CardId("card-m1-0badcafe")
VCM = VcmId("vcm-00000000000a")
OTHER_VCM = VcmId("vcm-00000000000b")
KMC_KEY = ec.generate_private_key(ec.SECP256R1())
KMC_SPKI = public_key_der(KMC_KEY.public_key())
CERTIFIED = CardReply(Chain(b"the card's chain", b"its root"), KMC_SPKI)


@cache
def transport() -> TransportKeys:
    return TransportKeys()


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def signed(statement: Statement, *keys: ec.EllipticCurvePrivateKey) -> Signed:
    payload = codec.encode(statement)
    data = signing_input(statement.KIND, payload)
    return Signed(
        statement.KIND,
        payload,
        tuple(Signature(fingerprint(public_key_der(k.public_key())), k.sign(data, ec.ECDSA(hashes.SHA256()))) for k in keys),
    )


def hpke_public_key(raw: bytes) -> hpke.MLKEM768X25519PublicKey:
    return hpke.MLKEM768X25519PublicKey(
        mlkem.MLKEM768PublicKey.from_public_bytes(raw[:1184]), x25519.X25519PublicKey.from_public_bytes(raw[1184:])
    )


class Consumer:
    """A consumer: Ukey key and both shares (the HSM's too: what a test needs to play the KMC)."""

    def __init__(self, name: str = "alice") -> None:
        self.name = ConsumerId(name)
        self.ukey = ec.generate_private_key(ec.SECP256R1())
        self.spki = public_key_der(self.ukey.public_key())
        self.hsm_share, self.ukey_share = secrets.token_bytes(32), secrets.token_bytes(32)

    def share(self, card: CardId = CARD, vcm: VcmId = VCM) -> SealedShare:
        return SealedShare(self.name, card, vcm, self.ukey_share, (self.spki,), KMC_SPKI, 1, 3, b"h" * 32)

    def delivery(
        self,
        share: SealedShare | None = None,
        *,
        rsa_public: rsa.RSAPublicKey | None = None,
        hpke_public: bytes = b"",
        info: bytes = b"",
        plaintext: bytes = b"",
        hsm_share: bytes = b"",
    ) -> CmkDelivery:
        """As the HSM and the terminal make it, by the plan's words and not by the card's code."""
        share = share or self.share()
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        wrapped = (rsa_public or transport().rsa.public_key()).encrypt(hsm_share or self.hsm_share, oaep)
        suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        bound = info or f"cipherfleet sealed share v1|{share.card}|{share.vcm}".encode()
        sealed = suite.encrypt(plaintext or codec.encode(share), hpke_public_key(hpke_public or transport().hpke_public_key), bound)
        return CmkDelivery(wrapped, sealed)

    def statement(self, nonce: bytes, duration_ms: int = 6000, *, card: CardId = CARD, vcm: VcmId = VCM) -> LeaseStatement:
        return LeaseStatement(self.name, card, vcm, nonce, duration_ms, 1, 3, b"h" * 32)

    def lease(self, nonce: bytes, duration_ms: int = 6000, *, card: CardId = CARD, vcm: VcmId = VCM) -> Signed:
        return signed(self.statement(nonce, duration_ms, card=card, vcm=vcm), self.ukey, KMC_KEY)


class Function:
    """A virtual function with its consumer; ``do`` runs an operation to its end."""

    def __init__(self, consumer: Consumer | None = None, vcm: VcmId = VCM, *, serving: bool = True) -> None:
        self.consumer = consumer or Consumer()
        self.vcm = vcm
        self.clock = Clock()
        self.inner = VirtualFunction(CARD, vcm, self.consumer.name, transport(), lambda: CERTIFIED, self.clock)
        if serving:
            self.load_cmk()
            self.renew()

    def do(self, operation: int, parameters: object = None, *, handle: int = 0, data: bytes = b"") -> Answer:
        raw = b"" if parameters is None else parameters if isinstance(parameters, bytes) else codec.encode(parameters)
        return self.inner.run(operation, handle, raw, memoryview(bytearray(data)))

    def load_cmk(self) -> None:
        self.do(Operation.LOAD_CMK, self.consumer.delivery(self.consumer.share(vcm=self.vcm)))

    def renew(self, duration_ms: int = 6000) -> None:
        nonce = bytes(self.do(Operation.LEASE_NONCE).data)
        self.do(Operation.LEASE, self.consumer.lease(nonce, duration_ms, vcm=self.vcm))

    def generate(self, name: str = "AES-256-GCM", key: KeyId | None = None, version: int = 1) -> tuple[int, EscrowRow]:
        request = RowRequest(key or new_key_id(), version, codec.encode(VersionAttributes(name, 1.5)))
        answer = self.do(Operation.GENERATE, request)
        return answer.value, msgspec.json.decode(answer.parameters, type=EscrowRow)

    def seal(self, name: str, material: bytes, *, info: bytes = b"") -> bytes:
        """As a client seals a key that it brings."""
        message = codec.encode(KeyMaterial(self.consumer.name, name, material))
        return TrustedCard(CARD, transport().hpke_public_key).seal(message, info or import_info(CARD, VCM))

    def bring(self, name: str, sealed: bytes, *, bare: bool = False) -> tuple[int, EscrowRow]:
        request = RowRequest(new_key_id(), 1, codec.encode(VersionAttributes(name, 1.5, bare=bare)))
        answer = self.do(Operation.IMPORT, ImportRequest(request, sealed))
        return answer.value, msgspec.json.decode(answer.parameters, type=EscrowRow)

    def load(self, name: str, material: bytes, *, bare: bool = False, version: int = 1) -> int:
        """The handle of a key of known ``material``, as if this consumer's card had wrapped it once."""
        chain = self.inner._chain
        assert chain is not None
        attributes = codec.encode(VersionAttributes(name, 1.5, bare=bare))
        row = engine_wrap.wrap(chain.wrapping, self.consumer.name, new_key_id(), version, attributes, bytearray(material))
        return self.do(Operation.LOAD, row).value

    def run(self, request: StreamRequest, data: bytes = b"", *, handle: int = 0) -> bytes:
        return bytes(self.do(Operation.RUN, request, handle=handle, data=data).data)

    def describe(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.do(Operation.DESCRIBE).parameters)
        return found


def key_attributes(revision: int = 1) -> bytes:
    return codec.encode(KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, revision, 1.5))


def make_key(name: str, *, version: int = 1) -> Key:
    chosen = algorithm(name)
    return Key(new_key_id(), version, chosen, generate_material(chosen))


def key_of(name: str, private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> Key:
    material = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Key(new_key_id(), 1, algorithm(name), bytearray(material))
