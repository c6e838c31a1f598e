"""An application's commands on its consumer's keys."""

import base64
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from cipherfleet import Client
from cipherfleet.app import output
from cipherfleet.app.options import In, Json, ProfileFile, read_small, run
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.vcm_api import KeyDescription

app = typer.Typer(help="Keys: create, import, list, show, rotate, enable, disable, delete.", no_args_is_help=True)

T = TypeVar("T")
Bare = Annotated[bool, typer.Option(help="An AEAD key whose ciphertexts are nonce, ciphertext and tag as the standard has them.")]
KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]


@app.command()
def create(
    profile: ProfileFile,
    name: Annotated[str | None, typer.Argument(metavar="[ALGORITHM]", show_default=False)] = None,
    algorithm: Annotated[str | None, typer.Option("--algorithm", "-a", help="See: cipherfleet algorithms (default AES-256-GCM).")] = None,
    label: Annotated[str, typer.Option(help="A name for people.")] = "",
    bare: Bare = False,
    json: Json = False,
) -> None:
    """Make a key; it is safe in the key escrow before this returns."""
    if name and algorithm and name != algorithm:
        raise Malformed("two algorithms are given", "give one")
    chosen = algorithm or name or "AES-256-GCM"
    _show(ask(profile, lambda client: client.create_key(chosen, label=label, bare=bare)), as_json=json)


@app.command("import")
def import_(
    profile: ProfileFile,
    algorithm: Annotated[str, typer.Argument(metavar="ALGORITHM", help="See: cipherfleet algorithms.")],
    source: In = None,
    label: Annotated[str, typer.Option(help="A name for people.")] = "",
    bare: Bare = False,
    json: Json = False,
) -> None:
    """Bring a key of your own: raw bytes, or a private key as PKCS#8. It is sealed to the card here, before it leaves."""
    material = read_small(source)
    _show(ask(profile, lambda client: client.import_key(algorithm, material, label=label, bare=bare)), as_json=json)


@app.command("list")
def list_(profile: ProfileFile, json: Json = False) -> None:
    """All keys of the consumer."""
    keys = ask(profile, lambda client: client.list_keys())
    if json:
        output.document(keys)
    else:
        output.table(
            "keys", ("id", "algorithm", "version", "state", "label"), [(k.id, k.algorithm, k.version, k.state, k.label) for k in keys]
        )


@app.command()
def show(
    key: KeyArgument,
    profile: ProfileFile,
    public_key: Annotated[Path | None, typer.Option(help="Write the public key here, PEM.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """One key: algorithm, versions, state, public key."""
    described = ask(profile, lambda client: client.describe_key(key))
    if public_key is not None:
        if not described.public_key:
            raise Malformed(f"a key of {described.algorithm} has no public key")
        public_key.write_bytes(to_pem(described.public_key))
    _show(described, as_json=json)


@app.command()
def rotate(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """A new version; older ones still decrypt."""
    _show(ask(profile, lambda client: client.rotate_key(key)), as_json=json)


@app.command()
def enable(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """Allow a disabled key again."""
    _show(ask(profile, lambda client: client.enable_key(key)), as_json=json)


@app.command()
def disable(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """Refuse every operation with this key until it is enabled."""
    _show(ask(profile, lambda client: client.disable_key(key)), as_json=json)


@app.command()
def delete(
    key: KeyArgument,
    profile: ProfileFile,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete a key: what it encrypted cannot be read any more."""
    if not yes and not json:
        typer.confirm(f"Delete {key}? What it encrypted is lost.", abort=True, err=True)
    _show(ask(profile, lambda client: client.delete_key(key)), as_json=json)


def ask(profile: Path, question: Callable[[Client], Awaitable[T]]) -> T:
    """One question to a VCM."""

    async def work() -> T:
        async with Client(profile) as client:
            return await question(client)

    return run(work())


def to_pem(der: bytes) -> bytes:
    """A SubjectPublicKeyInfo (DER) as PEM."""
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n".encode()


def from_pem(raw: bytes) -> bytes:
    """A public key as DER, whether it is PEM or DER already. Raises ``Malformed``."""
    lines = raw.strip().splitlines()
    if not lines or not lines[0].startswith(b"-----BEGIN"):
        return raw
    if lines[0].strip() != b"-----BEGIN PUBLIC KEY-----":
        raise Malformed("this PEM is no public key")
    try:
        return base64.b64decode(b"".join(line.strip() for line in lines[1:-1]), validate=True)
    except ValueError as exc:
        raise Malformed("this PEM cannot be read") from exc


def _show(key: KeyDescription, *, as_json: bool) -> None:
    if as_json:
        output.document(key)
        return
    facts = {**msgspec.to_builtins(key), "created_at": output.moment(key.created_at)}
    rows = [(name.replace("_", " "), value) for name, value in facts.items() if value not in ("", (), [], None)]
    output.table("key", ("what", "value"), rows)
