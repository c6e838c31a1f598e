"""The audit log, and the list of algorithms."""

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import msgspec
import typer

from cipherfleet.app import output
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.options import Json, State, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.algorithms import REGISTRY
from cipherfleet.contract.kmc_api import AuditLog

app = typer.Typer(help="The audit log: show, verify.", no_args_is_help=True)

ConsumerOption = Annotated[str, typer.Option(help="Only this consumer's (default: all).", show_default=False)]


@app.command()
def show(state: State, consumer: ConsumerOption = "", json: Json = False) -> None:
    """What happened: identities, tokens, keys, applications, revocations."""
    entries = run(_entries(Cloud(state), consumer, "/v1/audit")).entries
    if json:
        output.document(entries)
        return
    rows = [(e.consumer, e.sequence, output.moment(e.at), e.actor, e.event, e.subject, e.outcome) for e in entries]
    output.table("audit lines", ("consumer", "#", "at", "actor", "event", "subject", "outcome"), rows)


@app.command()
def verify(state: State, consumer: ConsumerOption = "", json: Json = False) -> None:
    """Check the chain of digests; exit 1 when a line was changed, removed or reordered."""
    log = run(_entries(Cloud(state), consumer, "/v1/audit/verify"))
    if json:
        output.document({"verified": len(log.entries)})
    else:
        output.screen.print(f"{len(log.entries)} audit lines verified")


async def _entries(cloud: Cloud, consumer: str, path: str) -> AuditLog:
    async with cloud.kmc() as kmc:
        return await kmc.call("GET", f"{path}?consumer={quote(consumer)}", reply=AuditLog)


def algorithms(
    profile: Annotated[Path | None, typer.Option("--profile", help="Also what the policy of this application's consumer allows.")] = None,
    json: Json = False,
) -> None:
    """Every algorithm, its standard, and the policy profiles that allow it."""
    name, refused = ask(profile, lambda client: client.policy()) if profile is not None else ("", {})
    known = REGISTRY.values()
    if json:
        documents = [msgspec.to_builtins(a) for a in known]
        for document in documents if name else ():
            document["allowed"], document["rule"] = document["name"] not in refused, refused.get(document["name"], "")
        output.document(documents)
        return
    rows = [(a.name, a.standard, a.kind, ", ".join(a.uses), ", ".join(a.profiles)) for a in known]
    if not name:
        output.table("algorithms", ("name", "standard", "kind", "uses", "profiles"), rows)
    else:
        verdict = [(*row, f"no: {refused[row[0]]}" if row[0] in refused else "yes") for row in rows]
        output.table("algorithms", ("name", "standard", "kind", "uses", "profiles", f"policy {name}"), verdict)
