"""Every algorithm on a real cloud, by the command line; and what ``openssl`` on the command line makes of it."""

import base64
import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from cipherfleet.contract.algorithms import REGISTRY, Algorithm, Kind
from tests.support import Consumer, Result, command, profile_file

DATA = hashlib.shake_256(b"every algorithm").digest(70_000)


class Desk:
    """A terminal at a desk: files in one folder, one profile."""

    def __init__(self, consumer: Consumer, folder: Path) -> None:
        self.folder, self.profile = folder, profile_file(consumer.sign_in(), folder)

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def run(self, *arguments: object) -> Result:
        return command(*arguments, "--profile", self.profile, "--json")

    def done(self, *arguments: object) -> bytes:
        """The result's bytes."""
        result = self.run(*arguments)
        assert result.status == 0, result.stdout
        return base64.b64decode(result.document["result"])

    def key(self, name: str, *more: object) -> str:
        made = self.run("key", "create", name, *more)
        assert made.status == 0, made.stdout
        return str(made.document["id"])

    def imported(self, name: str, secret: bytes, *more: object) -> str:
        made = self.run("key", "import", name, "--in", self.write("secret", secret), *more)
        assert made.status == 0, made.stdout
        return str(made.document["id"])

    def public(self, key: str) -> Path:
        path = self.folder / f"{key}.pem"
        assert self.run("key", "show", key, "--public-key", path).status == 0
        return path


@pytest.fixture
def desk(plugged: Consumer, tmp_path: Path) -> Desk:
    return Desk(plugged, tmp_path)


def openssl(*arguments: object, stdin: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *map(str, arguments)], input=stdin, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_does_its_work(desk: Desk) -> None:
    """One pass over the registry: a key, its operation, and back."""
    data, short = desk.write("data", DATA), desk.write("short", DATA[:48])
    for chosen in REGISTRY.values():
        if chosen.kind is Kind.DIGEST:
            assert len(desk.done("digest", "-a", chosen.name, "--in", data)) >= 28
            continue
        works(desk, chosen, desk.key(chosen.name), data, short)


def works(desk: Desk, chosen: Algorithm, key: str, data: Path, short: Path) -> None:
    match chosen.kind:
        case Kind.AEAD | Kind.CIPHER | Kind.KEY_WRAP | Kind.PUBLIC_KEY_ENCRYPTION:
            source = data if chosen.kind in (Kind.AEAD, Kind.CIPHER) else short
            tweak = ("--tweak", "3") if chosen.mode == "XTS" else ()
            ciphertext = desk.write("ciphertext", desk.done("encrypt", "--key", key, "--in", source, *tweak))
            assert desk.done("decrypt", "--key", key, "--in", ciphertext, *tweak) == source.read_bytes()
        case Kind.SIGNATURE:
            signature = desk.write("signature", desk.done("sign", "--key", key, "--in", data))
            assert desk.run("verify", "--key", key, "--in", data, "--signature", signature).document["valid"]
            refused = desk.run("verify", "--key", key, "--in", short, "--signature", signature)
            assert (refused.status, refused.document["error"]["code"]) == (1, "signature-invalid")
        case Kind.MAC:
            assert desk.done("mac", "--key", key, "--in", data) == desk.done("mac", "--key", key, "--in", data)
        case Kind.KEY_AGREEMENT:
            other = desk.key(chosen.name)
            mine = desk.done("agree", "--key", key, "--peer", desk.public(other))
            assert mine == desk.done("agree", "--key", other, "--peer", desk.public(key))
            assert desk.done("agree", "--key", key, "--peer", desk.public(other), "-n", "16") != mine[:16]
        case Kind.KEM:
            secret = desk.done("encapsulate", "--key", key, "--ciphertext", desk.folder / "kem")
            assert desk.done("decapsulate", "--key", key, "--in", desk.folder / "kem") == secret
        case Kind.KEY_DERIVATION:
            assert len(desk.done("derive", "--key", key, "-n", "48", "--context", "purpose")) == 48
        case Kind.DIGEST:
            raise AssertionError("digests have no keys")


def test_ciphers_and_openssl(desk: Desk) -> None:
    secret, iv, data = DATA[:32], DATA[32:48], desk.write("data", DATA)
    for name, cipher, size in (("AES-256-CBC", "aes-256-cbc", 32), ("AES-192-CTR", "aes-192-ctr", 24), ("SM4-CBC", "sm4-cbc", 16)):
        key = desk.imported(name, secret[:size])
        ciphertext = desk.done("encrypt", "--key", key, "--in", data)
        arguments = ("-K", secret[:size].hex(), "-iv")
        assert openssl("enc", "-d", f"-{cipher}", *arguments, ciphertext[:16].hex(), stdin=ciphertext[16:]) == DATA
        theirs = desk.write("theirs", iv + openssl("enc", f"-{cipher}", *arguments, iv.hex(), stdin=DATA))
        assert desk.done("decrypt", "--key", key, "--in", theirs) == DATA


def test_macs_and_openssl(desk: Desk) -> None:
    secret, data = DATA[:32], desk.write("data", DATA)
    for name, options in (("HMAC-SHA3-256", ("-digest", "SHA3-256", "HMAC")), ("AES-256-CMAC", ("-cipher", "AES-256-CBC", "CMAC"))):
        mac = desk.done("mac", "--key", desk.imported(name, secret), "--in", data)
        theirs = openssl("mac", "-macopt", f"hexkey:{secret.hex()}", "-in", data, *options)
        assert theirs.strip().decode().lower() == mac.hex()


def test_public_keys_and_openssl(desk: Desk) -> None:
    short = desk.write("short", DATA[:48])
    key = desk.key("RSA-2048-OAEP")
    oaep = ("-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:sha384", "-pkeyopt", "rsa_mgf1_md:sha384")
    theirs = desk.write("theirs", openssl("pkeyutl", "-encrypt", "-pubin", "-inkey", desk.public(key), "-in", short, *oaep))
    assert desk.done("decrypt", "--key", key, "--in", theirs, "--digest", "SHA-384") == DATA[:48]
    refused = desk.run("decrypt", "--key", key, "--in", theirs)
    assert (refused.status, refused.document["error"]["code"]) == (1, "ciphertext-invalid")

    signer = desk.key("ECDSA-P-384")
    signature = desk.write("signature", desk.done("sign", "--key", signer, "--in", short, "--digest", "SHA-512"))
    openssl("dgst", "-sha512", "-verify", desk.public(signer), "-signature", signature, short)

    exchange, ours = desk.key("X25519"), desk.folder / "x25519"
    openssl("genpkey", "-algorithm", "X25519", "-out", ours)
    peer = desk.write("peer", openssl("pkey", "-in", ours, "-pubout"))
    shared = openssl("pkeyutl", "-derive", "-inkey", ours, "-peerkey", desk.public(exchange))
    assert desk.done("agree", "--key", exchange, "--peer", peer) == shared


def test_a_batch_of_lines(desk: Desk) -> None:
    key = desk.key("HMAC-SHA-256")
    lines = [{"operation": "mac", "key": key, "data": base64.b64encode(b"%d" % n).decode()} for n in range(3)]
    lines.append({"operation": "sign", "key": key})
    source = desk.write("batch", "\n".join(json.dumps(line) for line in lines).encode())
    told = desk.run("batch", "--in", source)
    assert told.status == 0
    assert [bool(answer.get("error")) for answer in told.document] == [False, False, False, True]
    assert told.document[3]["error"]["code"] == "wrong-key-type"
    for bad in (b"", b"{", b'[{"operation": "format"}]'):
        refused = desk.run("batch", "--in", desk.write("bad", bad))
        assert (refused.status, refused.document["error"]["code"]) == (1, "malformed")


def test_what_is_not_allowed_is_refused_by_name(desk: Desk) -> None:
    data = desk.write("data", DATA)
    peer = desk.write("junk", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    gcm, ecdh, xts = desk.key("AES-256-GCM", "--bare"), desk.key("ECDH-P-256"), desk.key("AES-128-XTS")
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("public-key-invalid", ("agree", "--key", ecdh, "--peer", peer)),
        ("wrong-key-type", ("sign", "--key", gcm, "--in", data)),
        ("tag-too-short", ("decrypt", "--key", gcm, "--in", desk.write("cut", DATA[:20]))),
        ("ciphertext-invalid", ("decrypt", "--key", gcm, "--in", data)),
        ("malformed", ("encrypt", "--key", xts, "--in", data)),
        ("malformed", ("encrypt", "--key", xts, "--in", data, "--tweak", "1", "--context", "both")),
        ("algorithm-unknown", ("key", "create", "ROT-13")),
        ("wrong-key-type", ("key", "create", "SHA-256")),
        ("key-material-invalid", ("key", "import", "AES-128-XTS", "--in", desk.write("halves", b"same" * 8))),
    ]
    for code, arguments in cases:
        refused = desk.run(*arguments)
        assert (refused.status, refused.document["error"]["code"]) == (1, code), arguments


def test_sm2_and_openssl(desk: Desk) -> None:
    data, short = desk.write("data", DATA), desk.write("short", DATA[:48])
    signer, receiver = desk.key("SM2"), desk.key("SM2-ENCRYPT")
    signature = desk.write("signature", desk.done("sign", "--key", signer, "--in", data))
    rawin = ("-rawin", "-digest", "sm3", "-pkeyopt", "distid:1234567812345678")
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", desk.public(signer), "-in", data, "-sigfile", signature, *rawin)
    theirs = desk.write("theirs", openssl("pkeyutl", "-encrypt", "-pubin", "-inkey", desk.public(receiver), "-in", short))
    assert desk.done("decrypt", "--key", receiver, "--in", theirs) == DATA[:48]
    brought = desk.folder / "sm2.pem"
    openssl("genpkey", "-algorithm", "SM2", "-out", brought)
    own = desk.imported("SM2-ENCRYPT", brought.read_bytes())
    ours = desk.write("ours", desk.done("encrypt", "--key", own, "--in", short))
    assert openssl("pkeyutl", "-decrypt", "-inkey", brought, "-in", ours) == DATA[:48]
