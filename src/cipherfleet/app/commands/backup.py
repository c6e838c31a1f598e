"""Backup and restore of a cloud's state: the operator's commands."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cipherfleet.app import output
from cipherfleet.app.backup.create import create as create_backup
from cipherfleet.app.backup.manifest import Manifest
from cipherfleet.app.backup.restore import head_of, read_manifest
from cipherfleet.app.backup.restore import restore as restore_backup
from cipherfleet.app.backup.restore import verify as verify_backup
from cipherfleet.app.options import Json, State, read_passphrase, run
from cipherfleet.terminal.pin import wipe

app = typer.Typer(help="Backup and restore of the cloud's state: create, show, verify, restore.", no_args_is_help=True)

FileArgument = Annotated[Path, typer.Argument(help="The backup.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File whose first line is the backup's passphrase ('-': standard input); default: ask.",
        show_default=False,
    ),
]


@app.command()
def create(
    out: Annotated[Path, typer.Option("--out", help="The new file; it must not exist yet.")],
    state: State,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
) -> None:
    """Back up the state of KMC and management platform, and the HSM's sealed keys, while the cloud runs or not."""
    passphrase = read_passphrase(passphrase_file, confirm=True)
    try:
        with output.working("backing up", quiet=json) as say:
            manifest = run(create_backup(state, out, passphrase, progress=say))
    finally:
        wipe(passphrase)
    _show(manifest, out, as_json=json, said="was written")


@app.command()
def show(file: FileArgument, passphrase_file: PassphraseFile = None, json: Json = False) -> None:
    """What a backup holds: when it was made, of which cloud, up to where each consumer's keys go."""
    head_of(file)  # before anybody types a passphrase
    passphrase = read_passphrase(passphrase_file)
    try:
        manifest = read_manifest(file, passphrase)
    finally:
        wipe(passphrase)
    _show(manifest, file, as_json=json)


@app.command()
def verify(file: FileArgument, passphrase_file: PassphraseFile = None, json: Json = False) -> None:
    """Read a backup to its end; exit 1 when anything in it was changed or is missing."""
    head_of(file)
    passphrase = read_passphrase(passphrase_file)
    try:
        with output.working("verifying", quiet=json) as say:
            manifest = verify_backup(file, passphrase, progress=say)
    finally:
        wipe(passphrase)
    _show(manifest, file, as_json=json, said="is whole")


@app.command()
def restore(file: FileArgument, state: State, passphrase_file: PassphraseFile = None, json: Json = False) -> None:
    """Restore a backup into --state, a folder that is empty or not there yet. Start the cloud with `cipherfleet up` then.

    See to it that the old cloud never runs again: both would speak with the same keys.
    """
    head_of(file)
    passphrase = read_passphrase(passphrase_file)
    try:
        with output.working("restoring", quiet=json) as say:
            manifest = run(restore_backup(file, state, passphrase, progress=say))
    finally:
        wipe(passphrase)
    _show(manifest, file, as_json=json, said=f"is restored in {state}", more={"state": str(state)})


def _show(manifest: Manifest, file: Path, *, as_json: bool, said: str = "", more: dict[str, Any] | None = None) -> None:
    consumers = [
        {
            "name": c.name,
            "state": c.state,
            "epoch": c.epoch,
            "sequence": c.sequence,
            "head": c.head.hex(),
            "keys": c.keys,
            "applications": c.applications,
        }
        for c in manifest.consumers
    ]
    if as_json:
        files = [{"name": f.name, "size": f.size, "sha256": f.sha256.hex()} for f in manifest.files]
        cloud = {"network": manifest.cloud.network, "isolation": manifest.cloud.isolation, "machines": manifest.cloud.machines}
        shown = {
            "file": str(file),
            "version": manifest.version,
            "program": manifest.program,
            "created_at": manifest.created_at,
            "cloud": cloud,
        }
        output.document({**shown, "files": files, "consumers": consumers, **(more or {})})
        return
    made = datetime.fromtimestamp(manifest.created_at, UTC)
    output.screen.print(escape(f"{file}{' ' + said if said else ''}: made {made:%Y-%m-%d %H:%M:%S} UTC by cipherfleet {manifest.program}"))
    output.table("files", ("name", "bytes", "SHA-256"), [(f.name, f.size, f.sha256.hex()) for f in manifest.files])
    rows = [(c["name"], c["state"], c["epoch"], c["sequence"], c["keys"], c["applications"]) for c in consumers]
    output.table("consumers", ("name", "state", "epoch", "changes", "keys", "applications"), rows)
