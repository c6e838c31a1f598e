"""Names for keys: ``alias/NAME`` stands wherever a key's id may."""

from typing import Annotated

import typer

from cipherfleet.app import output
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.options import Json, ProfileFile

app = typer.Typer(help="Aliases of keys: set (also moves), list, delete.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The alias, with or without alias/ before it.")]


@app.command("set")
def set_(name: Name, key: Annotated[str, typer.Argument(metavar="ID")], profile: ProfileFile, json: Json = False) -> None:
    """Let alias/NAME stand for a key; one that stands for another key moves."""
    described = ask(profile, lambda client: client.set_alias(name, key))
    if json:
        output.document(described)
    else:
        output.screen.print(f"alias/{name.removeprefix('alias/')} is {described.id}")


@app.command("list")
def list_(profile: ProfileFile, json: Json = False) -> None:
    """All aliases of the consumer."""
    aliases = ask(profile, lambda client: client.list_aliases())
    if json:
        output.document(aliases)
    else:
        output.table("aliases", ("alias", "key"), [(f"alias/{alias.name}", alias.key) for alias in aliases])


@app.command()
def delete(name: Name, profile: ProfileFile, json: Json = False) -> None:
    """Take a name away; the key stays."""
    ask(profile, lambda client: client.delete_alias(name))
    if json:
        output.document({"alias": name.removeprefix("alias/"), "state": "deleted"})
