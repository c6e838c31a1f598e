"""The command ``cipherfleet``: exit 0 done, 1 failed with one line on standard error, 2 wrong usage."""

import os
import sys

import typer

from cipherfleet.app import output
from cipherfleet.app.commands import application, audit, backup, bench, cloud, consumer, data, demo, key_transfer, policy, ukey, vcm
from cipherfleet.app.options import Wish
from cipherfleet.channel.process import keep_freed_memory
from cipherfleet.contract.errors import CipherfleetError

app = typer.Typer(
    name="cipherfleet",
    help="A cryptography cloud: virtual cipher machines on demand, with the consumer's hand on the key.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(cloud.up)
app.command()(cloud.down)
app.command()(cloud.status)
app.add_typer(consumer.app, name="consumer")
app.command()(consumer.terminal)
app.add_typer(ukey.app, name="ukey")
app.add_typer(vcm.app, name="vcm")
app.add_typer(application.app, name="app")
app.add_typer(policy.app, name="policy")
app.add_typer(key_transfer.app, name="key")
for command in data.COMMANDS:
    app.command()(command)
app.command()(audit.algorithms)
app.add_typer(audit.app, name="audit")
app.add_typer(backup.app, name="backup")
app.add_typer(bench.app, name="bench")
app.command()(demo.demo)


def main() -> None:
    """Run one command; every error of ours becomes one line, or one JSON document."""
    keep_freed_memory()
    try:
        app()
    except CipherfleetError as error:
        output.failure(error, as_json=Wish.json)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
