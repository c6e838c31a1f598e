"""What a consumer permits itself: the policy on its Ukeys."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cipherfleet.app import output
from cipherfleet.app.options import Json, PinFile, UkeyFolder, read_file, read_pin, run
from cipherfleet.contract.algorithms import REGISTRY
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.policy import BUILT_IN, Policy, read_policy, refusal
from cipherfleet.terminal.memory import Remembered
from cipherfleet.terminal.policies import set_policy
from cipherfleet.terminal.ukey import DirectoryUkey

app = typer.Typer(help="The consumer's policy profile: show, set, check.", no_args_is_help=True)


@app.command()
def show(ukey: UkeyFolder, pin_file: PinFile = None, json: Json = False) -> None:
    """The policy on the Ukey: its number among the consumer's statements, and which Ukey signed it."""
    pin = read_pin(pin_file)
    with DirectoryUkey.open(ukey, pin) as opened:
        _tell(opened.memory.known, as_json=json)


@app.command("set")
def set_(
    policy: Annotated[str, typer.Argument(metavar="NAME|FILE", help=f"{', '.join(BUILT_IN)}, or a TOML file.")],
    ukey: UkeyFolder,
    pin_file: PinFile = None,
    json: Json = False,
) -> None:
    """Set the policy by one Ukey, for all of the consumer; it is in force in every card with the next heartbeat.

    The Ukey keeps it at once. The KMC stores it, signed, and the consumer's other Ukeys take it over when they are plugged in.
    """
    chosen = _read(policy)
    pin = read_pin(pin_file)

    async def work() -> Remembered:
        with DirectoryUkey.open(ukey, pin) as opened:
            await set_policy(opened, chosen)
            return opened.memory.known

    _tell(run(work()), as_json=json)


@app.command()
def check(
    policy: Annotated[str, typer.Argument(metavar="NAME|FILE", help=f"{', '.join(BUILT_IN)}, or a TOML file.")], json: Json = False
) -> None:
    """What a policy makes of each algorithm, before it is set."""
    chosen = _read(policy)
    found = {name: refusal(chosen, algorithm, bare=algorithm.bare_only) for name, algorithm in REGISTRY.items()}
    if json:
        told = ((name, why or ("", "")) for name, why in found.items())
        output.document([{"name": name, "allowed": not rule, "rule": rule, "reason": reason} for name, (rule, reason) in told])
    else:
        rows = [(name, "yes" if refused is None else "no", "" if refused is None else refused[1]) for name, refused in found.items()]
        output.table(f"policy {chosen.name}", ("algorithm", "allowed", "why not"), rows)


def _read(name: str) -> Policy:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not Path(name).exists():
        raise Malformed(f"{name!r} is no policy and no file", f"built in are: {', '.join(BUILT_IN)}")
    return read_policy(read_file(Path(name)))


def _tell(known: Remembered, *, as_json: bool) -> None:
    facts = {field: getattr(known.policy, field) for field in known.policy.__struct_fields__}
    facts |= {"epoch": known.policy_point[0], "number": known.policy_point[1], "signed_by": known.policy_by}
    if as_json:
        output.document(facts)
    else:
        rows = [(field.replace("_", " "), ", ".join(value) if isinstance(value, tuple) else value) for field, value in facts.items()]
        output.table("policy", ("what", "value"), [(what, msgspec.to_builtins(value)) for what, value in rows])
