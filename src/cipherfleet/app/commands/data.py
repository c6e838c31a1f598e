"""An application's commands on data: files or standard input and output, of any size."""

import base64
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cipherfleet import Client
from cipherfleet.app import output
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.commands.key import from_pem
from cipherfleet.app.options import In, Json, ProfileFile, read_file, read_small, run
from cipherfleet.contract.errors import FileProblem, Malformed
from cipherfleet.services.wire import BatchAskItem

Key = Annotated[str, typer.Option("--key", help="The key's id, or alias/NAME.")]
KeyIfKnown = Annotated[
    str | None, typer.Option("--key", help="The only key that it may be of; a bare ciphertext needs it.", show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", help="Output file (default: standard output).", show_default=False)]
Context = Annotated[str, typer.Option("--context", help="Encryption context: authenticated, not stored; needed again to decrypt.")]
Tweak = Annotated[int | None, typer.Option(min=0, help="XTS: the number of the data unit.", show_default=False)]
Version = Annotated[int | None, typer.Option(min=1, help="The key's version (default: the newest).", show_default=False)]
DigestChoice = Annotated[str, typer.Option("--digest", help="One of the digests that the key's algorithm allows.", show_default=False)]
Prehashed = Annotated[bool, typer.Option("--prehashed", help="The input is the digest itself (ML-DSA: mu).")]
SignatureContext = Annotated[str, typer.Option("--context", help="ML-DSA: context string; SM2: user id.")]
Length = Annotated[int, typer.Option("--bytes", "-n", min=0, max=4096, help="How many, by HKDF; 0: the shared secret itself.")]
SignatureFile = Annotated[Path, typer.Option("--signature", help="The signature's file.")]


def encrypt(
    profile: ProfileFile,
    key: Key,
    source: In = None,
    out: Out = None,
    context: Context = "",
    tweak: Tweak = None,
    chosen: DigestChoice = "",
    json: Json = False,
) -> None:
    """Encrypt; the ciphertext names its key and version. Of a bare key it is what the standard says."""
    _stream("encrypt", profile, source, out, json, key=key, context=_context(context, tweak), digest=chosen)


def decrypt(
    profile: ProfileFile,
    source: In = None,
    out: Out = None,
    context: Context = "",
    key: KeyIfKnown = None,
    version: Version = None,
    tweak: Tweak = None,
    chosen: DigestChoice = "",
    json: Json = False,
) -> None:
    """Decrypt; nothing unverified is ever written (CBC, CTR and XTS verify nothing)."""
    _stream("decrypt", profile, source, out, json, context=_context(context, tweak), key=key, version=version, digest=chosen)


def reencrypt(
    profile: ProfileFile,
    key: Key,
    source: In = None,
    out: Out = None,
    context: Context = "",
    to_context: Annotated[str, typer.Option(help="The new context.")] = "",
    json: Json = False,
) -> None:
    """Move a ciphertext to another key, or to the newest version of its own, inside the card."""
    _stream("reencrypt", profile, source, out, json, key=key, context=context.encode(), target_context=to_context.encode())


def sign(
    profile: ProfileFile,
    key: Key,
    source: In = None,
    out: Out = None,
    chosen: DigestChoice = "",
    prehashed: Prehashed = False,
    context: SignatureContext = "",
    json: Json = False,
) -> None:
    """Sign; ECDSA and SM2 in DER, PSS with a salt as long as the digest, Ed25519 pure (as openssl reads them)."""
    with _opened(source) as data:
        how: dict[str, Any] = {"digest": chosen, "prehashed": prehashed, "context": context.encode()}
        signature = ask(profile, lambda client: client.sign(key, data, **how))
    _deliver(signature, out, json, key=key)


def verify(
    profile: ProfileFile,
    key: Key,
    signature: SignatureFile,
    source: In = None,
    version: Version = None,
    chosen: DigestChoice = "",
    prehashed: Prehashed = False,
    context: SignatureContext = "",
    json: Json = False,
) -> None:
    """Check a signature; exit 1 when it is bad."""
    value = read_file(signature)
    with _opened(source) as data:
        how: dict[str, Any] = {"version": version, "digest": chosen, "prehashed": prehashed, "context": context.encode()}
        ask(profile, lambda client: client.verify(key, data, value, **how))
    if json:
        output.document({"valid": True, "key": key})
    else:
        output.screen.print("signature is valid")


def mac(profile: ProfileFile, key: Key, source: In = None, out: Out = None, json: Json = False) -> None:
    """A message authentication code."""
    with _opened(source) as data:
        code = ask(profile, lambda client: client.mac(key, data))
    _deliver(code, out, json, key=key)


def digest(
    profile: ProfileFile,
    algorithm: Annotated[str, typer.Option("--algorithm", "-a", help="A digest of: cipherfleet algorithms.")] = "SHA-256",
    source: In = None,
    out: Out = None,
    length: Annotated[int, typer.Option(min=0, max=4096, help="Bytes wanted of SHAKE (0: the usual).")] = 0,
    json: Json = False,
) -> None:
    """A digest; hex on a terminal, raw bytes into a file or pipe."""
    with _opened(source) as data:
        value = ask(profile, lambda client: client.digest(algorithm, data, length=length))
    if out is None and not json and sys.stdout.isatty():
        output.screen.print(value.hex())
    else:
        _deliver(value, out, json, algorithm=algorithm, hex=value.hex())


def agree(
    profile: ProfileFile,
    key: Key,
    peer: Annotated[Path, typer.Option(help="The other side's public key, PEM or DER.")],
    length: Length = 0,
    context: Context = "",
    out: Out = None,
    json: Json = False,
) -> None:
    """Agree on a secret with the holder of a public key (ECDH, X25519, X448)."""
    public = from_pem(read_file(peer))
    _deliver(ask(profile, lambda client: client.agree(key, public, length=length, context=context.encode())), out, json, key=key)


def derive(profile: ProfileFile, key: Key, length: Length = 32, context: Context = "", out: Out = None, json: Json = False) -> None:
    """Derive a secret from a key by HKDF: the same each time."""
    _deliver(ask(profile, lambda client: client.derive(key, length, context=context.encode())), out, json, key=key)


def encapsulate(
    profile: ProfileFile,
    key: Key,
    ciphertext: Annotated[Path, typer.Option(help="Where the ciphertext goes.")],
    out: Out = None,
    json: Json = False,
) -> None:
    """A fresh secret, and its ciphertext for the holder of the key (ML-KEM)."""
    made = ask(profile, lambda client: client.encapsulate(key))
    with _target(ciphertext, False) as target:
        target.write(made.ciphertext)
    _deliver(made.secret, out, json, key=key, ciphertext=str(ciphertext))


def decapsulate(profile: ProfileFile, key: Key, source: In = None, version: Version = None, out: Out = None, json: Json = False) -> None:
    """The secret of a ciphertext (ML-KEM)."""
    ciphertext = read_small(source)
    _deliver(ask(profile, lambda client: client.decapsulate(key, ciphertext, version=version)), out, json, key=key)


def batch(profile: ProfileFile, source: In = None, json: Json = False) -> None:
    """Up to 1,000 short operations at once: a JSON array (or lines) of {"operation", "key", "data", ...}, bytes in base64."""
    items = read_items(read_small(source, 8 * 1024 * 1024))
    answers = ask(profile, lambda client: client.batch(items))
    if json:
        output.document(answers)
    else:
        for answer in answers:
            output.screen.print_json(data=msgspec.to_builtins(answer), indent=None)


def random(
    profile: ProfileFile,
    count: Annotated[int, typer.Option("--bytes", "-n", min=1, max=1024 * 1024, help="How many.")] = 32,
    out: Out = None,
    json: Json = False,
) -> None:
    """Random bytes from the card."""
    _deliver(ask(profile, lambda client: client.random(count)), out, json)


def _stream(verb: str, profile: Path, source: Path | None, out: Path | None, as_json: bool, **how: Any) -> None:
    """Bytes through the VCM, however many, with bounded memory; a file appears only when it is whole."""

    async def work() -> int:
        written = 0
        async with Client(profile) as client:
            call = getattr(client, f"{verb}_stream")
            with _opened(source) as data, output.transfer(verb, _size(source), quiet=as_json) as moved, _target(out, as_json) as target:
                produced: AsyncIterator[bytes] = call(data=data, progress=moved, **how)
                async for piece in produced:
                    target.write(piece)
                    written += len(piece)
                if as_json and out is None:
                    output.document({"result": base64.b64encode(target.getvalue()).decode(), "bytes": written})
        return written

    written = run(work())
    if as_json and out is not None:
        output.document({"file": str(out), "bytes": written})


def read_items(raw: bytes) -> tuple[BatchAskItem, ...]:
    """A batch: a JSON array, or an item a line. Raises ``Malformed``."""
    try:
        if raw.lstrip().startswith(b"["):
            return msgspec.json.decode(raw, type=tuple[BatchAskItem, ...])
        return tuple(msgspec.json.decode(line, type=BatchAskItem) for line in raw.splitlines() if line.strip())
    except msgspec.MsgspecError as exc:
        raise Malformed(f"the batch cannot be read: {exc}") from exc


def _context(text: str, tweak: int | None) -> bytes:
    """The encryption context; XTS's number of a data unit is 16 bytes, little endian (IEEE 1619)."""
    if tweak is None:
        return text.encode()
    if text or tweak >= 2**128:
        raise Malformed("a tweak is a number below 2**128, and there is no other context then")
    return tweak.to_bytes(16, "little")


def _deliver(value: bytes, out: Path | None, as_json: bool, **facts: Any) -> None:
    if out is not None:
        with _target(out, as_json) as target:
            target.write(value)
    if as_json:
        where = {"file": str(out), "bytes": len(value)} if out is not None else {"result": base64.b64encode(value).decode()}
        output.document({**where, **facts})
    elif out is None:
        sys.stdout.buffer.write(value)
        sys.stdout.buffer.flush()


@contextmanager
def _opened(source: Path | None) -> Any:
    if source is None:
        yield sys.stdin.buffer
        return
    try:
        file = source.open("rb")
    except OSError as exc:
        raise FileProblem(f"cannot read {source}: {exc.strerror}") from exc
    with file:
        yield file


@contextmanager
def _target(out: Path | None, as_json: bool) -> Any:
    """Where the output goes: a file that is renamed into place at the end, memory (for JSON), or standard output."""
    if out is None:
        if as_json:
            import io

            yield io.BytesIO()
        else:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        return
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(out)
    except OSError as exc:
        raise FileProblem(f"cannot write {out}: {exc.strerror}") from exc
    finally:
        partial.unlink(missing_ok=True)


def _size(source: Path | None) -> int | None:
    return source.stat().st_size if source is not None else None


COMMANDS: tuple[Callable[..., None], ...] = (
    encrypt,
    decrypt,
    reencrypt,
    sign,
    verify,
    mac,
    digest,
    random,
    agree,
    derive,
    encapsulate,
    decapsulate,
    batch,
)
