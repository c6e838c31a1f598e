"""An application's commands on its consumer's keys."""

import base64
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from cipherfleet import Client
from cipherfleet.app import output
from cipherfleet.app.commands import key_alias, key_delegation
from cipherfleet.app.commands.asking import ask
from cipherfleet.app.commands.key_terms import MaxUses, NotAfter, NotBefore, RotateDays, RotateUses, period, seconds
from cipherfleet.app.options import In, Json, KeyArgument, ProfileFile, read_small
from cipherfleet.channel import codec
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.statements import DestructionStatement
from cipherfleet.contract.vcm_api import KeyDescription
from cipherfleet.services.middleware.envelope import NewKey

app = typer.Typer(
    help="Keys: create, import, list, show, update, rotate, trim, enable, disable, delete, alias, delegate.", no_args_is_help=True
)
app.add_typer(key_alias.app, name="alias")
app.command()(key_delegation.delegate)
app.command()(key_delegation.delegations)

T = TypeVar("T")
SHOWN = 1000
MAX_BATCH_FILE_BYTES = 512 * 1024 * 1024
Bare = Annotated[bool, typer.Option(help="An AEAD key whose ciphertexts are nonce, ciphertext and tag as the standard has them.")]
Exportable = Annotated[bool, typer.Option(help="It may leave the card, wrapped; fixed for ever.")]
TwoPerson = Annotated[bool, typer.Option(help="Nothing of it is destroyed unless two applications want it.")]
Tag = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A tag; as often as wanted.", show_default=False)]


@app.command()
def create(
    profile: ProfileFile,
    name: Annotated[str | None, typer.Argument(metavar="[ALGORITHM]", show_default=False)] = None,
    algorithm: Annotated[str | None, typer.Option("--algorithm", "-a", help="See: cipherfleet algorithms (default AES-256-GCM).")] = None,
    label: Annotated[str, typer.Option(help="A name for people.")] = "",
    bare: Bare = False,
    not_before: NotBefore = None,
    not_after: NotAfter = None,
    rotate_days: RotateDays = None,
    rotate_uses: RotateUses = None,
    max_uses: MaxUses = None,
    exportable: Exportable = False,
    two_person: TwoPerson = False,
    tag: Tag = None,
    count: Annotated[int, typer.Option(min=1, max=100_000, help="How many; of each thousand (of RSA fewer) all are made, or none.")] = 1,
    json: Json = False,
) -> None:
    """Make a key, or many alike; it is safe in the key escrow before this returns."""
    if name and algorithm and name != algorithm:
        raise Malformed("two algorithms are given", "give one")
    chosen = algorithm or name or "AES-256-GCM"
    terms = _terms(not_before, not_after, rotate_days, rotate_uses, max_uses, exportable, two_person)
    tags = dict(map(_tag, tag or ()))
    if count > 1:
        with output.counting("making keys", count, quiet=json) as done:
            made = ask(profile, lambda client: client.create_keys(chosen, [label] * count, bare=bare, terms=terms, tags=tags, done=done))
        _show_all(made, as_json=json)
        return
    show_key(ask(profile, lambda client: client.create_key(chosen, label=label, bare=bare, terms=terms, tags=tags)), as_json=json)


@app.command("import")
def import_(
    profile: ProfileFile,
    algorithm: Annotated[str | None, typer.Argument(metavar="[ALGORITHM]", help="See: cipherfleet algorithms.", show_default=False)] = None,
    source: In = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Many keys: lines of {"algorithm", "material" (base64), "label", "bare", "terms", "tags"}; - is standard input.',
            show_default=False,
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="A name for people.")] = "",
    bare: Bare = False,
    not_before: NotBefore = None,
    not_after: NotAfter = None,
    rotate_days: RotateDays = None,
    rotate_uses: RotateUses = None,
    max_uses: MaxUses = None,
    exportable: Exportable = False,
    two_person: TwoPerson = False,
    tag: Tag = None,
    json: Json = False,
) -> None:
    """Bring a key of your own: raw bytes, or a private key as PKCS#8. It is sealed to the card here, before it leaves.

    With --batch many at once: of each thousand all are in the escrow then, or none. A line's terms are named as in `key show`, times in
    unix seconds.
    """
    terms = _terms(not_before, not_after, rotate_days, rotate_uses, max_uses, exportable, two_person)
    if batch is not None:
        if algorithm is not None or source is not None or label or bare or tag or terms != NO_TERMS:
            raise Malformed("a batch says of each key what it is", "give --batch alone")
        keys = read_keys(batch)
        with output.counting("importing keys", len(keys), quiet=json) as done:
            made = ask(profile, lambda client: client.import_keys(keys, done=done))
        _show_all(made, as_json=json)
        return
    if algorithm is None:
        raise Malformed("no algorithm is given", "see: cipherfleet algorithms")
    material, tags = read_small(source), dict(map(_tag, tag or ()))
    show_key(
        ask(profile, lambda client: client.import_key(algorithm, material, label=label, bare=bare, terms=terms, tags=tags)), as_json=json
    )


@app.command("list")
def list_(
    profile: ProfileFile,
    label: Annotated[str, typer.Option(help="Only keys whose label begins so.")] = "",
    state: Annotated[str, typer.Option(help="Only keys of this state: enabled, disabled, pending-deletion, deleted.")] = "",
    algorithm: Annotated[str, typer.Option("--algorithm", "-a", help="Only keys of this algorithm.")] = "",
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Only keys with this tag.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, however many: what --json does by default.")] = False,
    json: Json = False,
) -> None:
    """Keys of the consumer in the order of their creation; by --label in the order of labels."""
    if everything and limit is not None:
        raise Malformed("--all and --limit do not go together", "give one")
    tags = dict(map(_tag, tag or ()))
    most = limit if limit is not None or everything or json else SHOWN
    keys = ask(profile, lambda client: client.list_keys(limit=most, label=label, state=state, algorithm=algorithm, tags=tags))
    _show_all(keys, as_json=json)
    if not json and limit is None and len(keys) == most:
        output.errors.print(f"the first {most}; all of them with: cipherfleet key list --all", markup=False)


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
    show_key(described, as_json=json)


@app.command()
def rotate(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """A new version; older ones still decrypt."""
    show_key(ask(profile, lambda client: client.rotate_key(key)), as_json=json)


@app.command()
def enable(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """Allow a disabled key again."""
    show_key(ask(profile, lambda client: client.enable_key(key)), as_json=json)


@app.command()
def disable(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """Refuse every operation with this key until it is enabled."""
    show_key(ask(profile, lambda client: client.disable_key(key)), as_json=json)


@app.command()
def update(
    key: KeyArgument,
    profile: ProfileFile,
    label: Annotated[str | None, typer.Option(help="A new name for people.", show_default=False)] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Add or replace a tag.", show_default=False)] = None,
    untag: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Remove a tag.", show_default=False)] = None,
    not_before: NotBefore = None,
    not_after: NotAfter = None,
    rotate_days: RotateDays = None,
    rotate_uses: RotateUses = None,
    max_uses: MaxUses = None,
    json: Json = False,
) -> None:
    """Change a key's label, tags and terms; 0 or never takes a term away."""

    async def change(client: Client) -> KeyDescription:
        return await client.update_key(
            key,
            label=label,
            tags=dict(map(_tag, tag or ())),
            untag=untag or (),
            not_before=seconds(not_before),
            not_after=seconds(not_after),
            rotation_s=period(rotate_days),
            rotation_uses=rotate_uses,
            max_uses=max_uses,
        )

    show_key(ask(profile, change), as_json=json)


@app.command()
def trim(
    key: KeyArgument,
    profile: ProfileFile,
    before: Annotated[int, typer.Option(min=1, help="Versions below this one are destroyed.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Destroy old versions of a key: what only they can decrypt or verify is lost."""
    if not yes and not json:
        typer.confirm(f"Destroy the versions of {key} before {before}? What only they can decrypt is lost.", abort=True, err=True)
    show_key(ask(profile, lambda client: client.trim_key(key, before)), as_json=json)


@app.command()
def delete(
    key: KeyArgument,
    profile: ProfileFile,
    days: Annotated[float | None, typer.Option(help="How long it waits (default 30, from 7 on).", show_default=False)] = None,
    now: Annotated[bool, typer.Option("--now", help="Destroy it at once.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Schedule a key's deletion: it refuses every use at once, and is destroyed after a waiting time; or destroy it `--now`."""
    if now and days is not None:
        raise Malformed("--now does not wait, so it goes with no --days")
    if not yes and not json:
        lost = "What it encrypted is lost" if now else "No use from now on, and what it encrypted is lost when it is destroyed"
        typer.confirm(f"Delete {key}? {lost}.", abort=True, err=True)
    show_key(ask(profile, lambda client: client.delete_key(key) if now else client.schedule_key_deletion(key, days=days)), as_json=json)


@app.command()
def derive(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The key to derive from, of HKDF.")],
    algorithm: Annotated[str, typer.Argument(metavar="ALGORITHM", help="A symmetric one.")],
    profile: ProfileFile,
    context: Annotated[str, typer.Option(help="What the new key is for: another context, another key.")],
    label: Annotated[str, typer.Option(help="A name for people.")] = "",
    bare: Bare = False,
    json: Json = False,
) -> None:
    """A new key that another one gives in the card, the same for the same context."""
    told = context.encode()
    show_key(ask(profile, lambda client: client.derive_key(source, algorithm, context=told, label=label, bare=bare)), as_json=json)


@app.command()
def receipt(
    key: KeyArgument,
    profile: ProfileFile,
    out: Annotated[Path | None, typer.Option("--out", help="Write the receipt here, JSON.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """The HSM's signed word that a key, or trimmed versions of it, were destroyed."""
    told = ask(profile, lambda client: client.destruction_receipt(key))
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1))
    statement = msgspec.json.decode(told.receipt.payload, type=DestructionStatement)
    if json:
        output.document({"statement": statement, "receipt": told.receipt, "signer": told.signer})
        return
    rows = [(one.version, one.digest.hex()) for one in statement.material]
    output.table(f"destroyed of {statement.key}, change {statement.sequence} of the escrow", ("version", "SHA-256 of the row"), rows)


@app.command("cancel-deletion")
def cancel_deletion(key: KeyArgument, profile: ProfileFile, json: Json = False) -> None:
    """Get a key back whose deletion is scheduled; it is disabled then."""
    show_key(ask(profile, lambda client: client.cancel_key_deletion(key)), as_json=json)


def _terms(
    not_before: str | None,
    not_after: str | None,
    rotate_days: float | None,
    rotate_uses: int | None,
    max_uses: int | None,
    exportable: bool,
    two_person: bool,
) -> KeyTerms:
    return KeyTerms(
        not_before=seconds(not_before) or 0.0,
        not_after=seconds(not_after) or 0.0,
        rotation_s=period(rotate_days) or 0.0,
        rotation_uses=rotate_uses or 0,
        max_uses=max_uses or 0,
        exportable=exportable,
        two_person=two_person,
    )


def _tag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Malformed(f"{text!r} is no NAME=VALUE")
    return name, value


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


def read_keys(path: Path) -> list[NewKey]:
    """A file of JSON lines. Raises ``Malformed``, which says which line, or ``FileProblem``."""
    keys = []
    for number, line in enumerate(read_small(None if str(path) == "-" else path, MAX_BATCH_FILE_BYTES).splitlines(), 1):
        if line.strip():
            one = codec.decode(line, _Line, what=f"line {number}")
            keys.append(NewKey(one.algorithm, one.material, one.label, one.bare, one.terms, one.tags))
    if not keys:
        raise Malformed("there is no key in the batch")
    return keys


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    algorithm: str
    material: bytes
    label: str = ""
    bare: bool = False
    terms: KeyTerms = NO_TERMS
    tags: dict[str, str] = msgspec.field(default_factory=dict)


def _show_all(keys: Sequence[KeyDescription], *, as_json: bool) -> None:
    if as_json:
        output.document(keys)
        return
    rows = [(key.id, key.algorithm, key.version, key.state, key.label) for key in keys]
    output.table("keys", ("id", "algorithm", "version", "state", "label"), rows)


def show_key(key: KeyDescription, *, as_json: bool) -> None:
    if as_json:
        output.document(key)
        return
    facts = {**msgspec.to_builtins(key), "created_at": output.moment(key.created_at)}
    facts |= {name: output.moment(facts[name]) for name in ("delete_at", "next_rotation_at") if facts[name] is not None}
    rows = [(name.replace("_", " "), value) for name, value in facts.items() if value not in ("", (), [], {}, None, 0)]
    output.table("key", ("what", "value"), rows)
