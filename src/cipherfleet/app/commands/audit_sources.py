"""Where an audit log comes from: the operator's KMC, a VCM for an application, the KMC for a Ukey, or an exported file."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from cipherfleet import Client
from cipherfleet.app.options import read_pin
from cipherfleet.app.wiring import Cloud
from cipherfleet.channel import codec
from cipherfleet.channel.audit_check import AuditCheck, AuditVerdict
from cipherfleet.contract.audit import PLATFORM, AuditEntry, AuditHead, AuditHeads, AuditLog, AuditPoint, AuditQuery, Sealing
from cipherfleet.contract.errors import AuditBroken, CertificateInvalid, FileProblem, Malformed
from cipherfleet.contract.statements import Signed
from cipherfleet.services.middleware.connection import read_profile
from cipherfleet.state.files import write_private
from cipherfleet.terminal.callers import kmc_caller
from cipherfleet.terminal.ukey import DirectoryUkey

Ask = Callable[[AuditQuery], Awaitable[AuditLog]]


class Source(msgspec.Struct):
    """``logs``: the consumers whose logs there are. ``key``: whose seals count, empty: whose the source says. ``seen``: by the Ukey."""

    ask: Ask
    logs: tuple[str, ...]
    key: bytes = b""
    seen: AuditPoint | None = None


@asynccontextmanager
async def source(state: Path, consumer: str, profile: Path | None, ukey: Path | None, pin_file: Path | None) -> AsyncIterator[Source]:
    """The Ukey's way, an application's, or the operator's, as the options say."""
    if ukey is not None:
        with DirectoryUkey.open(ukey, read_pin(pin_file)) as opened:
            async with kmc_caller(opened) as kmc:
                record = opened.record
                ask = lambda query: kmc.call("GET", query.path, reply=AuditLog)  # noqa: E731
                yield Source(ask, (record.consumer,), record.kmc_signing_key, opened.memory.audit)
    elif profile is not None:
        async with Client(profile) as client:
            if not client.profile.kmc_signing_key:
                raise CertificateInvalid("the profile does not name the KMC's signing key", "sign the application in again")
            yield Source(client.audit_page, (client.profile.consumer,), client.profile.kmc_signing_key)
    else:
        async with Cloud(state).kmc() as kmc:
            ask = lambda query: kmc.call("GET", query.path, reply=AuditLog)  # noqa: E731
            heads = await kmc.call("GET", "/v1/audit/heads", reply=AuditHeads)
            yield Source(ask, (consumer,) if consumer else tuple(head.consumer or PLATFORM for head in heads.heads))


async def verify(found: Source, name: str) -> AuditVerdict:
    """One log, to its end. Raises ``AuditBroken``."""
    first = await found.ask(AuditQuery(name))
    check = AuditCheck("" if name == PLATFORM else name, found.key or first.signing_key, seen=found.seen)
    query = check.page(first)
    while query is not None:
        query = check.page(await found.ask(msgspec.structs.replace(query, consumer=name)))
    return check.end()


# -- exported files ----------------------------------------------------------------------------------------------------


class Exported(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of an exported log: the head first, then entries and checkpoints in their order, and the end."""

    head: AuditHead | None = None
    signing_key: bytes = b""  # the source's word; a consumer checks with its own
    sealing: Sealing | None = None  # by which rule the log was sealed, and when it was exported: the source's word
    entry: AuditEntry | None = None
    checkpoint: Signed | None = None
    end: bool = False


async def export(found: Source, name: str, out: Path) -> int:
    """Write a log to ``out``, whole or not at all, without checking it; how many entries."""
    entries: list[AuditEntry] = []
    checkpoints: list[Signed] = []
    query: AuditQuery | None = AuditQuery(name)
    head: AuditHead | None = None
    sealing: Sealing | None = None
    key = found.key
    while query is not None:
        page = await found.ask(query)
        entries += page.entries
        checkpoints += page.checkpoints
        head, key, sealing = page.head, key or page.signing_key, page.sealing
        more = bool(page.entries) and head is not None and head.sequence > page.entries[-1].sequence
        query = AuditQuery(name, after=page.entries[-1].sequence) if more else None
    lines = [Exported(head=head, signing_key=key, sealing=sealing)]
    lines += [Exported(checkpoint=signed) for signed in checkpoints]
    lines += [Exported(entry=entry) for entry in entries]
    try:
        write_private(out, b"".join(codec.encode(line) + b"\n" for line in [*lines, Exported(end=True)]))
    except OSError as exc:
        raise FileProblem(f"cannot write {out}: {exc.strerror}") from exc
    return len(entries)


def verify_file(file: Path, key: bytes, seen: AuditPoint | None, consumer: str) -> AuditVerdict:
    """An exported log. ``consumer``: whose it must be, empty for whose it says. Raises ``AuditBroken`` or ``FileProblem``."""
    try:
        raw = file.read_bytes()
    except OSError as exc:
        raise FileProblem(f"cannot read {file}: {exc.strerror}") from exc
    lines = raw.split(b"\n")
    try:
        first = codec.decode(lines[0], Exported)
    except Malformed as exc:
        raise AuditBroken(f"{file} is not an exported audit log, or its first line was changed") from exc
    if first.head is None or (consumer and first.head.consumer != consumer):
        raise AuditBroken(f"{file} is not the audit log of {consumer or 'anybody'}")
    check = AuditCheck(first.head.consumer, key or first.signing_key, seen=seen)
    entries: list[AuditEntry] = []
    ended = False
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        try:
            read = codec.decode(line, Exported)
        except Malformed as exc:
            raise AuditBroken(f"line {number} of {file}, near entry {len(entries) + 1}, cannot be read") from exc
        if read.checkpoint is not None:
            check.checkpoints((read.checkpoint,))
        if read.entry is not None:
            entries.append(read.entry)
        ended = read.end
    check.page(AuditLog(tuple(entries), head=first.head, sealing=first.sealing))
    if not ended or (entries and entries[-1].sequence < first.head.sequence) or (first.head.sequence and not entries):
        raise AuditBroken(f"{file} lacks entry {len(entries) + 1} or its end: it was cut off")
    return check.end()


def anchors(profile: Path | None, ukey: Path | None, pin_file: Path | None) -> tuple[bytes, AuditPoint | None, str]:
    """Whose seals count, what the Ukey has seen, and whose log it must be, for a file that is checked offline."""
    if ukey is not None:
        with DirectoryUkey.open(ukey, read_pin(pin_file)) as opened:
            return opened.record.kmc_signing_key, opened.memory.audit, opened.record.consumer
    if profile is not None:
        read = read_profile(profile)
        return read.kmc_signing_key, None, read.consumer
    return b"", None, ""
