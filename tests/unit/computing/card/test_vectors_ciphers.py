"""Ciphers against published vectors, by handle and through a virtual function. File names are of the package ``cryptography_vectors``.

The card makes nonces and IVs itself, so a vector is shown by decryption; where a mode takes no nonce (XTS, key wrap), both ways.
"""

from collections.abc import Iterator

import pytest

from cipherfleet.contract.errors import CiphertextInvalid
from cipherfleet.contract.vcc import Operation, StreamRequest, Verb
from tests.unit.computing.card.consumer import Function
from tests.unit.computing.card.published import lines, octets, records, shows

AES = (128, 192, 256)


@pytest.fixture(scope="module")
def function() -> Function:
    return Function()


def opened(function: Function, handle: int, sealed: bytes, associated: bytes = b"") -> bytes:
    return function.run(StreamRequest(Verb.DECRYPT, associated), sealed, handle=handle)


@shows("AES-128-GCM", "AES-192-GCM", "AES-256-GCM")
@pytest.mark.parametrize("bits", AES)
def test_gcm_sp800_38d(function: Function, bits: int) -> None:
    """ciphers/AES/GCM/gcmEncryptExtIV*.rsp (NIST CAVP): 96-bit nonces, whole tags, all lengths of associated data; the same, cut."""
    count = 0
    for r in records(f"ciphers/AES/GCM/gcmEncryptExtIV{bits}.rsp"):
        if (r.get("IVlen"), r.get("Taglen")) != ("96", "128") or "Key" not in r:
            continue
        key, nonce, plaintext, associated, ciphertext, tag = octets(r, "Key", "IV", "PT", "AAD", "CT", "Tag")
        handle = function.load(f"AES-{bits}-GCM", key, bare=True)
        assert opened(function, handle, nonce + ciphertext + tag, associated) == plaintext
        with pytest.raises(CiphertextInvalid):
            opened(function, handle, nonce + ciphertext + bytes([tag[0] ^ 1]) + tag[1:], associated)
        function.do(Operation.UNLOAD, handle=handle)
        count += 1
    assert count >= 300


@shows("AES-128-CCM", "AES-192-CCM", "AES-256-CCM")
@pytest.mark.parametrize("bits", AES)
def test_ccm_sp800_38c(function: Function, bits: int) -> None:
    """ciphers/AES/CCM/VNT*.rsp (NIST CAVP), section Nlen = 12: tags of 16 bytes, 32 bytes of associated data."""
    count = 0
    for r in records(f"ciphers/AES/CCM/VNT{bits}.rsp", keeps=("Key",)):
        if r.get("Nlen") != "12" or "CT" not in r:
            continue
        key, nonce, associated, plaintext, sealed = octets(r, "Key", "Nonce", "Adata", "Payload", "CT")
        handle = function.load(f"AES-{bits}-CCM", key, bare=True)
        assert opened(function, handle, nonce + sealed, associated) == plaintext
        count += 1
    assert count == 10


@shows("AES-128-GCM-SIV", "AES-256-GCM-SIV")
def test_gcm_siv_rfc8452() -> None:
    """ciphers/AES/GCM-SIV/openssl.txt (the vectors of RFC 8452, appendix C, as OpenSSL has them)."""
    function, counts = Function(), {128: 0, 256: 0}
    for r in records("ciphers/AES/GCM-SIV/openssl.txt", begins="COUNT"):
        if "Key" not in r:
            continue
        key, nonce, tag, plaintext, ciphertext = octets(r, "Key", "IV", "Tag", "Plaintext", "Ciphertext")
        associated = bytes.fromhex(r.get("AAD", ""))
        handle = function.load(f"AES-{len(key) * 8}-GCM-SIV", key, bare=True)
        assert opened(function, handle, nonce + ciphertext + tag, associated) == plaintext
        counts[len(key) * 8] += 1
    assert min(counts.values()) >= 10


@shows("ChaCha20-Poly1305")
def test_chacha20_poly1305_rfc8439(function: Function) -> None:
    """ciphers/ChaCha20Poly1305/openssl.txt (RFC 8439's, and the same changed), then boringssl.txt, which has texts in quotes."""
    count = 0
    for r in records("ciphers/ChaCha20Poly1305/openssl.txt", begins="COUNT"):
        if "Key" not in r:
            continue
        key, nonce, associated, ciphertext, tag = octets(r, "Key", "IV", "AAD", "Ciphertext", "Tag")
        handle = function.load("ChaCha20-Poly1305", key, bare=True)
        if "Result" in r:
            with pytest.raises(CiphertextInvalid):
                opened(function, handle, nonce + ciphertext + tag, associated)
        else:
            assert opened(function, handle, nonce + ciphertext + tag, associated) == bytes.fromhex(r["Plaintext"])
        count += 1
    assert count >= 2
    for record in quoted("ciphers/ChaCha20Poly1305/boringssl.txt"):
        if len(record["TAG"]) != 16 or len(record["NONCE"]) != 12:
            continue
        handle = function.load("ChaCha20-Poly1305", record["KEY"], bare=True)
        assert opened(function, handle, record["NONCE"] + record["CT"] + record["TAG"], record["AD"]) == record["IN"]
        function.do(Operation.UNLOAD, handle=handle)
        count += 1
    assert count >= 50


def quoted(name: str) -> Iterator[dict[str, bytes]]:
    """The records of a file whose values are hex, or text in quotes."""
    record: dict[str, bytes] = {}
    for line in [*lines(name), ""]:
        field, found, value = line.partition("= ")
        if found and field.strip() != "COUNT":
            record[field.strip()] = value.strip('"').encode() if value.startswith('"') else bytes.fromhex(value)
        elif not line and len(record) == 6:
            yield record
            record = {}


@shows("SM4-GCM")
def test_sm4_gcm_rfc8998(function: Function) -> None:
    """ciphers/SM4/rfc8998.txt (RFC 8998, A.2), associated data and tag included."""
    (r,) = [r for r in records("ciphers/SM4/rfc8998.txt") if "KEY" in r and len(r["IV"]) == 24 and "TAG" in r][:1]
    key, nonce, associated, plaintext, ciphertext, tag = octets(r, "KEY", "IV", "AAD", "PLAINTEXT", "CIPHERTEXT", "TAG")
    handle = function.load("SM4-GCM", key, bare=True)
    assert opened(function, handle, nonce + ciphertext + tag, associated) == plaintext
    with pytest.raises(CiphertextInvalid):
        opened(function, handle, nonce + ciphertext + tag)


def streamed(function: Function, handle: int, *parts: bytes) -> bytes:
    """What UPDATEs give: without FINISH, which would look for padding that the vectors do not have."""
    stream = function.do(Operation.BEGIN, StreamRequest(Verb.DECRYPT), handle=handle).value
    out = b"".join(bytes(function.do(Operation.UPDATE, handle=stream, data=part).data) for part in parts)
    function.do(Operation.ABORT, handle=stream)
    return out


@shows("AES-128-CBC", "AES-192-CBC", "AES-256-CBC")
@pytest.mark.parametrize("bits", AES)
def test_cbc_sp800_38a(function: Function, bits: int) -> None:
    """ciphers/AES/CBC/CBCMMT*.rsp (NIST CAVP, multi-block messages)."""
    count = 0
    for r in records(f"ciphers/AES/CBC/CBCMMT{bits}.rsp"):
        if "KEY" not in r:
            continue
        key, iv, plaintext, ciphertext = octets(r, "KEY", "IV", "PLAINTEXT", "CIPHERTEXT")
        handle = function.load(f"AES-{bits}-CBC", key)
        assert streamed(function, handle, iv, ciphertext) == plaintext
        assert streamed(function, handle, iv + ciphertext[:16], ciphertext[16:]) == plaintext
        count += 1
    assert count == 20


@shows("SM4-CBC", "SM4-CTR")
def test_sm4_modes(function: Function) -> None:
    """ciphers/SM4/draft-ribose-cfrg-sm4-10-cbc.txt and -ctr.txt (appendix A.2 of the draft, the examples of GB/T 17964)."""
    for mode, known in (("cbc", 2), ("ctr", 2)):
        count = 0
        for r in records(f"ciphers/SM4/draft-ribose-cfrg-sm4-10-{mode}.txt"):
            if "KEY" not in r:
                continue
            key, iv, plaintext, ciphertext = octets(r, "KEY", "IV", "PLAINTEXT", "CIPHERTEXT")
            assert streamed(function, function.load(f"SM4-{mode.upper()}", key), iv, ciphertext) == plaintext
            count += 1
        assert count >= known


@shows("AES-128-CTR", "AES-192-CTR", "AES-256-CTR")
@pytest.mark.parametrize("bits", AES)
def test_ctr_rfc3686(function: Function, bits: int) -> None:
    """ciphers/AES/CTR/aes-*-ctr.txt (RFC 3686)."""
    count = 0
    for r in records(f"ciphers/AES/CTR/aes-{bits}-ctr.txt"):
        if "KEY" not in r:
            continue
        key, iv, plaintext, ciphertext = octets(r, "KEY", "IV", "PLAINTEXT", "CIPHERTEXT")
        handle = function.load(f"AES-{bits}-CTR", key)
        assert opened(function, handle, iv + ciphertext) == plaintext
        count += 1
    assert count == 3


@shows("AES-128-XTS", "AES-256-XTS")
@pytest.mark.parametrize("bits", [128, 256])
def test_xts_sp800_38e(function: Function, bits: int) -> None:
    """ciphers/AES/XTS/tweak-128hexstr/XTSGenAES*.rsp (NIST CAVP), data units of whole bytes, both ways."""
    count = 0
    for r in records(f"ciphers/AES/XTS/tweak-128hexstr/XTSGenAES{bits}.rsp"):
        if "Key" not in r or int(r["DataUnitLen"]) % 8:
            continue
        key, tweak, plaintext, ciphertext = octets(r, "Key", "i", "PT", "CT")
        handle = function.load(f"AES-{bits}-XTS", key)
        assert function.run(StreamRequest(Verb.ENCRYPT, tweak), plaintext, handle=handle) == ciphertext
        assert opened(function, handle, ciphertext, tweak) == plaintext
        function.do(Operation.UNLOAD, handle=handle)
        count += 1
    assert count >= 100


@shows(*(f"AES-{bits}-{mode}" for bits in AES for mode in ("KW", "KWP")))
@pytest.mark.parametrize("mode", ["KW", "KWP"])
@pytest.mark.parametrize("bits", AES)
def test_key_wrap_sp800_38f(function: Function, bits: int, mode: str) -> None:
    """keywrap/kwtestvectors/KW_AE, KW_AD, KWP_AE and KWP_AD (NIST CAVP): the first ten of each length; those that must fail, do."""
    counts = {"AE": 0, "AD": 0, "FAIL": 0}
    for way in ("AE", "AD"):
        for r in records(f"keywrap/kwtestvectors/{mode}_{way}_{bits}.txt"):
            if "K" not in r or int(r["COUNT"]) >= 10:
                continue
            handle = function.load(f"AES-{bits}-{mode}", bytes.fromhex(r["K"]))
            if "FAIL" in r:
                with pytest.raises(CiphertextInvalid):
                    opened(function, handle, bytes.fromhex(r["C"]))
                counts["FAIL"] += 1
            else:
                plaintext, wrapped = octets(r, "P", "C")
                assert function.run(StreamRequest(Verb.ENCRYPT), plaintext, handle=handle) == wrapped
                assert opened(function, handle, wrapped) == plaintext
                counts[way] += 1
            function.do(Operation.UNLOAD, handle=handle)
    assert min(counts.values()) >= 5
