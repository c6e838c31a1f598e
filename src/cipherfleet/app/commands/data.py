"""An application's commands on data: files or standard input and output, of any size."""

import base64
import os
import sys
from collections.abc import AsyncIterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cipherfleet import Client
from cipherfleet.app import output
from cipherfleet.app.commands.key import ask
from cipherfleet.app.options import In, Json, ProfileFile, read_file, run
from cipherfleet.contract.errors import FileProblem

Key = Annotated[str, typer.Option("--key", help="The key's id.")]
Out = Annotated[Path | None, typer.Option("--out", help="Output file (default: standard output).", show_default=False)]
Context = Annotated[str, typer.Option("--context", help="Encryption context: authenticated, not stored; needed again to decrypt.")]
SignatureFile = Annotated[Path, typer.Option("--signature", help="The signature's file.")]


def encrypt(profile: ProfileFile, key: Key, source: In = None, out: Out = None, context: Context = "", json: Json = False) -> None:
    """Encrypt; the ciphertext names its key and version."""
    _stream("encrypt", profile, source, out, json, key=key, context=context.encode())


def decrypt(
    profile: ProfileFile,
    source: In = None,
    out: Out = None,
    context: Context = "",
    key: Annotated[str | None, typer.Option("--key", help="The only key that it may be of.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Decrypt; nothing unverified is ever written."""
    _stream("decrypt", profile, source, out, json, context=context.encode(), key=key)


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


def sign(profile: ProfileFile, key: Key, source: In = None, out: Out = None, json: Json = False) -> None:
    """Sign; ECDSA in DER, PSS with SHA-256, Ed25519 pure (as openssl reads them)."""
    with _opened(source) as data:
        signature = ask(profile, lambda client: client.sign(key, data))
    _deliver(signature, out, json, key=key)


def verify(profile: ProfileFile, key: Key, signature: SignatureFile, source: In = None, json: Json = False) -> None:
    """Check a signature; exit 1 when it is bad."""
    value = read_file(signature)
    with _opened(source) as data:
        ask(profile, lambda client: client.verify(key, data, value))
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
    algorithm: Annotated[str, typer.Option("--algorithm", "-a", help="SHA-256, SHA-384, SHA-512 or SM3.")] = "SHA-256",
    source: In = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """A digest; hex on a terminal, raw bytes into a file or pipe."""
    with _opened(source) as data:
        value = ask(profile, lambda client: client.digest(algorithm, data))
    if out is None and not json and sys.stdout.isatty():
        output.screen.print(value.hex())
    else:
        _deliver(value, out, json, algorithm=algorithm, hex=value.hex())


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
