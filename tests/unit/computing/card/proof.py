"""What a key of each kind can do, done once: that it is whole, and that what is not its own is refused."""

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x448, x25519

from cipherfleet.contract.algorithms import Algorithm, Kind
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import CiphertextInvalid, CiphertextTruncated, MacInvalid, SignatureInvalid
from cipherfleet.contract.vcc import StreamRequest, Verb
from tests.unit.computing.card.consumer import Function

TWEAK = (7).to_bytes(16, "little")
DATA = b"sixteen bytes or a few more."


def spki(public: x25519.X25519PublicKey | x448.X448PublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def peer_of(public: bytes) -> tuple[bytes, bytes]:
    """A fresh public key of the curve of ``public``, and what both then share."""
    ours = serialization.load_der_public_key(public)
    match ours:
        case ec.EllipticCurvePublicKey():
            private = ec.generate_private_key(ours.curve)
            return spki(private.public_key()), private.exchange(ec.ECDH(), ours)
        case x25519.X25519PublicKey():
            other = x25519.X25519PrivateKey.generate()
            return spki(other.public_key()), other.exchange(ours)
        case x448.X448PublicKey():
            another = x448.X448PrivateKey.generate()
            return spki(another.public_key()), another.exchange(ours)
    raise AssertionError("no key of an agreement")


def proves_itself(function: Function, chosen: Algorithm, handle: int, public: bytes) -> None:
    """That the key under ``handle`` does what its kind says."""

    def run(verb: Verb, data: bytes = b"", **more: object) -> bytes:
        return function.run(StreamRequest(verb, **more), data, handle=handle)  # type: ignore[arg-type]

    match chosen.kind:
        case Kind.AEAD:
            ciphertext = run(Verb.ENCRYPT, DATA)
            assert run(Verb.DECRYPT, ciphertext[HEADER_BYTES:], header=ciphertext[:HEADER_BYTES]) == DATA
        case Kind.CIPHER | Kind.KEY_WRAP | Kind.PUBLIC_KEY_ENCRYPTION:
            context = TWEAK if chosen.mode == "XTS" else b""
            data = DATA[:24]
            ciphertext = run(Verb.ENCRYPT, data, context=context)
            assert data not in ciphertext
            assert run(Verb.DECRYPT, ciphertext, context=context) == data
            if chosen.kind is not Kind.CIPHER:
                changed = ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])
                with pytest.raises((CiphertextInvalid, CiphertextTruncated)):
                    run(Verb.DECRYPT, changed, context=context)
        case Kind.MAC:
            mac = run(Verb.MAC, DATA)
            run(Verb.VERIFY_MAC, DATA, signature=mac)
            with pytest.raises(MacInvalid):
                run(Verb.VERIFY_MAC, DATA + b"!", signature=mac)
        case Kind.SIGNATURE:
            if chosen.family != "SM2":  # a curve that the library does not have
                serialization.load_der_public_key(public)
            signature = run(Verb.SIGN, DATA)
            run(Verb.VERIFY, DATA, signature=signature)
            with pytest.raises(SignatureInvalid):
                run(Verb.VERIFY, DATA + b"!", signature=signature)
        case Kind.KEY_AGREEMENT:
            peer, shared = peer_of(public)
            assert run(Verb.AGREE, peer=peer) == shared
            assert len(run(Verb.AGREE, peer=peer, length=48, context=b"c", salt=b"s")) == 48
        case Kind.KEM:
            theirs = serialization.load_der_public_key(public)
            assert isinstance(theirs, mlkem.MLKEM768PublicKey | mlkem.MLKEM1024PublicKey)
            secret, ciphertext = theirs.encapsulate()
            assert run(Verb.DECAPSULATE, ciphertext) == secret
            both = run(Verb.ENCAPSULATE)
            assert run(Verb.DECAPSULATE, both[32:]) == both[:32]
        case Kind.KEY_DERIVATION:
            derived = run(Verb.DERIVE, length=40, context=b"purpose")
            assert len(derived) == 40
            assert run(Verb.DERIVE, length=40, context=b"purpose") == derived != run(Verb.DERIVE, length=40, context=b"another")
        case Kind.DIGEST:
            raise AssertionError("digests have no keys")
