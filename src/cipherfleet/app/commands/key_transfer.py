"""Keys that come and go wrapped, with files that openssl reads and writes."""

from pathlib import Path
from typing import Annotated

import typer

from cipherfleet.app import output
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.commands.key import app, from_pem, show_key, to_pem
from cipherfleet.app.options import In, Json, KeyArgument, ProfileFile, read_file, read_small
from cipherfleet.contract.errors import Malformed


@app.command("import-parameters")
def import_parameters(
    profile: ProfileFile,
    algorithm: Annotated[str, typer.Argument(metavar="ALGORITHM", help="See: cipherfleet algorithms.")],
    public_key: Annotated[Path, typer.Option(help="Write the RSA key to wrap to here, PEM.")],
    token: Annotated[Path, typer.Option(help="Write the import token here.")],
    bits: Annotated[int, typer.Option(help="Of the RSA key: 3072 or 4096.")] = 4096,
    json: Json = False,
) -> None:
    """A one-time key to wrap a key of your own to, and the token to import it with; both are good for a day."""
    made = ask(profile, lambda client: client.import_parameters(algorithm, bits=bits))
    public_key.write_bytes(to_pem(made.public_key))
    token.write_bytes(made.token)
    if json:
        output.document(made)
    else:
        output.screen.print(f"key {made.key} can be imported until {output.moment(made.expires_at)}")


@app.command("import-wrapped")
def import_wrapped(
    profile: ProfileFile,
    token: Annotated[Path, typer.Option(help="The import token.")],
    source: In = None,
    label: Annotated[str, typer.Option(help="A name for people.")] = "",
    json: Json = False,
) -> None:
    """Import what was wrapped to the key of `key import-parameters`."""
    wrapped, raw = read_small(source), read_file(token)
    show_key(ask(profile, lambda client: client.import_wrapped(raw, wrapped, label=label)), as_json=json)


@app.command()
def export(
    key: KeyArgument,
    profile: ProfileFile,
    out: Annotated[Path, typer.Option(help="The wrapped key.")],
    to: Annotated[Path | None, typer.Option(help="Wrap to this RSA public key, PEM.", show_default=False)] = None,
    wrap_key: Annotated[str, typer.Option(help="Wrap under this key of AES-256-KWP.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """Take a key that was made --exportable out of the card, wrapped."""
    if (to is None) == (not wrap_key):
        raise Malformed("a key is exported --to a public key or under a --wrap-key", "give one")
    public_key = b"" if to is None else from_pem(read_file(to))
    made = ask(profile, lambda client: client.export_key(key, public_key=public_key, wrapping_key=wrap_key))
    out.write_bytes(made.wrapped)
    if json:
        output.document(made)


__all__ = ["app"]
