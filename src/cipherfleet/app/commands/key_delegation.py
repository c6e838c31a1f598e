"""An application's rights with a key, given on to another application: within what the Ukey lets it delegate."""

import time
from typing import Annotated

import typer

from cipherfleet.app import output
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.grant_text import parse_grant, show_grant
from cipherfleet.app.options import Json, KeyArgument, ProfileFile
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.vcm_api import Delegation

SHAPE = "OPERATION,...[:expires=30d|12h|2030-12-31][,context=TEXT|base64:...][,pair=NAME:VALUE][,rate=N]"


def delegate(
    key: KeyArgument,
    profile: ProfileFile,
    to: Annotated[str, typer.Option(metavar="APPLICATION", help="Who gets it: an application of the same consumer.")],
    may: Annotated[
        list[str] | None, typer.Option(help=f"What, in the place of what it got before; repeatable: {SHAPE}.", show_default=False)
    ] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take back what this application gave.")] = False,
    json: Json = False,
) -> None:
    """Let another application use a key, within a grant that the consumer made with `delegate`. It cannot be delegated further."""
    if revoke == bool(may):
        raise Malformed("say what it may do, or that it is taken back", "give --may or --revoke")
    grants = [parse_grant(text, time.time()) for text in may or ()]
    if any(grant.keys or grant.labels or grant.delegate for grant in grants):
        raise Malformed("what is delegated is for the one key, and not to delegate further", SHAPE)
    if revoke:
        made = ask(profile, lambda client: client.revoke_delegation(key, to))
    else:
        made = ask(profile, lambda client: client.delegate_key(key, to, grants))
    if json:
        output.document(made)
    elif revoke:
        output.screen.print(f"{made.delegate} lost what it was given of {made.key}")
    else:
        output.screen.print(f"{made.delegate} may {_may(made)} with {made.key}")


def delegations(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """What was delegated of a key, by this application or to it; with the right to show every key, all."""
    found = ask(profile, lambda client: client.list_delegations(key))
    if json:
        output.document(found)
    else:
        rows = [(one.delegator, one.delegate, _may(one), one.state) for one in found]
        output.table("delegations", ("from", "to", "may", "state"), rows)


def _may(one: Delegation) -> str:
    return "\n".join(show_grant(grant).replace(f"key={one.key},", "").replace(f":key={one.key}", "") for grant in one.grants)


__all__ = ["delegate", "delegations"]
