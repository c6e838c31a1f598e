"""What a cloud is: ``cloud.json`` in its state folder."""

import ipaddress
import os
import random
import socket
from contextlib import suppress
from pathlib import Path

import msgspec

from cipherfleet.channel import codec
from cipherfleet.contract.errors import FileProblem, NotRunning, StateNewer
from cipherfleet.contract.settings import Settings

FILE = "cloud.json"
STATE_VERSION = 1
PORT = 7443
NETWORKS = range(16, 255)


class CloudRecord(msgspec.Struct, frozen=True):
    """``cloud.json``: what a cloud is. ``network`` is the second octet of all its addresses."""

    version: int
    network: int
    isolation: str
    machines: int
    settings: Settings = Settings()
    passphrase_file: str = ""
    passphrase_asked: bool = False  # it is on no disk: whoever starts the HSM types it


def default_state() -> Path:
    """``$CIPHERFLEET_STATE``, else ``~/.local/state/cipherfleet``."""
    configured = os.environ.get("CIPHERFLEET_STATE")
    return Path(configured) if configured else Path.home() / ".local" / "state" / "cipherfleet"


def read_record_of(state: Path) -> CloudRecord:
    """What cloud a folder holds. Raises ``NotRunning``, ``StateNewer``, ``Malformed`` or ``FileProblem``."""
    path = state / FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError as exc:
        raise NotRunning(f"there is no cloud in {state}") from exc
    except OSError as exc:
        raise FileProblem(f"cannot read {path}: {exc.strerror}") from exc
    version = codec.decode(raw, dict[str, object], what=str(path)).get("version")
    if not isinstance(version, int) or version > STATE_VERSION:
        raise StateNewer(f"{state} has version {version}, this program knows {STATE_VERSION}")
    return codec.decode(raw, CloudRecord, what=str(path))


def free_network() -> int:
    """A network number none of whose platform addresses is in use."""
    for number in random.SystemRandom().sample(NETWORKS, len(NETWORKS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((str(ipaddress.IPv4Address(f"127.{number}.0.1")), PORT))
            return number
    raise FileProblem("every network number of this machine is in use")
