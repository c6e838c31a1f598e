"""The audit log, and the list of algorithms."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from cipherfleet.app import output
from cipherfleet.app.commands import audit_sources
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.options import Json, PinFile, State, run
from cipherfleet.channel.audit_check import AuditVerdict
from cipherfleet.contract.algorithms import REGISTRY
from cipherfleet.contract.audit import MAX_PAGE, AuditEntry, AuditQuery
from cipherfleet.contract.errors import Malformed

app = typer.Typer(help="The audit log: show, verify, export.", no_args_is_help=True)

FOLLOW_S = 1.0

ConsumerOption = Annotated[str, typer.Option(help="Only this consumer's ('-': the operator's own; default: all).", show_default=False)]
Profile = Annotated[
    Path | None,
    typer.Option("--profile", help="An application's profile: its consumer's log, through a VCM.", show_default=False),
]
UkeyOption = Annotated[
    Path | None,
    typer.Option("--ukey", help="The consumer's Ukey: its log, from the KMC, and what the Ukey remembers of it.", show_default=False),
]
LogFile = Annotated[Path | None, typer.Option("--file", help="A log that was exported, checked offline.", show_default=False)]


@app.command()
def show(
    state: State,
    consumer: ConsumerOption = "",
    profile: Profile = None,
    ukey: UkeyOption = None,
    pin_file: PinFile = None,
    since: Annotated[str, typer.Option(help="From this time on, ISO 8601 (UTC unless it says otherwise).", show_default=False)] = "",
    event: Annotated[str, typer.Option(help="Only this event.", show_default=False)] = "",
    key: Annotated[str, typer.Option(help="Only what concerns this key.", show_default=False)] = "",
    after: Annotated[int, typer.Option(min=0, help="From the entry after this number on, not the newest.", show_default=False)] = 0,
    limit: Annotated[int, typer.Option(min=1, max=MAX_PAGE, help="How many entries.")] = MAX_PAGE,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes; with --json one document a line.")] = False,
    json: Json = False,
) -> None:
    """What happened: identities, tokens, keys, applications, revocations, uses. The newest entries that fit."""
    asked = AuditQuery.parse(
        {"consumer": consumer, "after": str(after), "since": str(_seconds(since)), "event": event, "key": key, "limit": str(limit)}
    )

    async def work() -> None:
        async with audit_sources.source(state, consumer, profile, ukey, pin_file) as found:
            entries = (await found.ask(msgspec.structs.replace(asked, newest=not after))).entries
            if not follow:
                _show(entries, as_json=json)
                return
            _lines(entries, as_json=json)
            reached = {entry.consumer: entry.sequence for entry in entries}
            while True:
                await asyncio.sleep(FOLLOW_S)
                for name in found.logs:
                    owner = "" if name == "-" else name
                    query = msgspec.structs.replace(asked, consumer=name, after=reached.get(owner, after))
                    new = (await found.ask(query)).entries
                    _lines(new, as_json=json)
                    if new:
                        reached[owner] = new[-1].sequence

    run(work())


@app.command()
def verify(
    state: State,
    consumer: ConsumerOption = "",
    profile: Profile = None,
    ukey: UkeyOption = None,
    pin_file: PinFile = None,
    file: LogFile = None,
    json: Json = False,
) -> None:
    """Check every entry and every seal here, without trusting the KMC's word; exit 1 names the first entry that is not as it was written.

    With --ukey also that nothing was cut off, together with its seals, that the Ukey remembers.
    """

    async def online() -> tuple[AuditVerdict, ...]:
        async with audit_sources.source(state, consumer, profile, ukey, pin_file) as found:
            return tuple([await audit_sources.verify(found, name) for name in found.logs])

    if file is not None:
        signing_key, seen, owner = audit_sources.anchors(profile, ukey, pin_file)
        verdicts: tuple[AuditVerdict, ...] = (audit_sources.verify_file(file, signing_key, seen, consumer or owner),)
    else:
        verdicts = run(online())
    total = sum(verdict.verified for verdict in verdicts)
    if json:
        output.document({"verified": total, "logs": verdicts})
        return
    for verdict in verdicts:
        whose = verdict.consumer or "the platform"
        remembered = f", entry {verdict.ukey} is the one that the Ukey remembers" if verdict.ukey else ""
        sealed = f"{verdict.sealed} of them under a seal"
        output.screen.print(f"{verdict.verified} audit entries of {whose} verified, {sealed}{remembered}")
        if verdict.late:
            output.screen.print(f"{verdict.late} of them got their seal late: the HSM was away, or seals were deleted and made anew")


@app.command()
def export(
    state: State,
    out: Annotated[Path, typer.Option(help="Where the log goes, JSON lines (mode 0600).")],
    consumer: ConsumerOption = "",
    profile: Profile = None,
    ukey: UkeyOption = None,
    pin_file: PinFile = None,
    json: Json = False,
) -> None:
    """Write one log with its seals to a file, for `audit verify --file`."""

    async def work() -> tuple[int, str]:
        async with audit_sources.source(state, consumer, profile, ukey, pin_file) as found:
            if len(found.logs) != 1:
                raise Malformed("one log at a time is exported", "say whose with --consumer ('-': the operator's own)")
            return await audit_sources.export(found, found.logs[0], out), found.logs[0]

    entries, whose = run(work())
    if json:
        output.document({"entries": entries, "consumer": whose, "file": str(out)})
    else:
        output.screen.print(f"{entries} audit entries of {whose} are in {escape(str(out))}")


def _show(entries: tuple[AuditEntry, ...], *, as_json: bool) -> None:
    if as_json:
        output.document(entries)
        return
    rows = [(e.consumer, e.sequence, output.moment(e.at), e.actor, e.event, e.subject, e.outcome, e.count) for e in entries]
    output.table("audit entries", ("consumer", "#", "at", "actor", "event", "subject", "outcome", "count"), rows)


def _lines(entries: tuple[AuditEntry, ...], *, as_json: bool) -> None:
    for e in entries:
        if as_json:
            output.document(e)
        else:
            times = f" x{e.count}" if e.count > 1 else ""
            text = f"{output.moment(e.at)} {e.consumer or '-'} {e.sequence} {e.actor}: {e.event} {e.subject} {e.outcome}{times}"
            output.screen.print(escape(text), soft_wrap=True)


def _seconds(text: str) -> float:
    """Unix seconds of an ISO 8601 time. Raises ``Malformed``."""
    if not text:
        return 0.0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise Malformed(f"{text[:60]!r} is no time", "write it as 2026-01-31 or 2026-01-31T12:00:00") from exc
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


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
