"""The ``openssl`` program, asked what it can do; and the card's keys that it meets.

Keys in these tests are for nothing else, so they may stand on a command line, where openssl wants secret ones.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import pytest

from cipherfleet.contract.algorithms import REGISTRY, Algorithm
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes
from cipherfleet.contract.vcc import StreamRequest, Verb
from tests.unit.computing.card.consumer import Function

CANNOT: dict[str, str] = {
    "AES-*-CCM": "`openssl enc` takes no authenticated modes, `openssl cms` no CCM",
    "AES-*-GCM-SIV": "`openssl enc` takes no authenticated modes, `openssl cms` no GCM-SIV",
    "SM4-GCM": "`openssl enc` takes no authenticated modes, `openssl cms` no SM4-GCM",
    "AES-*-XTS": "`openssl enc` takes no XTS",
    "HPKE-*": "no command does HPKE",
}
"""What no release of the program does on the command line, by patterns of our names. Published vectors hold these in their place."""

EXERCISED: set[str] = set()
"""Names of algorithms that a test marked with ``meets`` tries against the program."""

Test = TypeVar("Test", bound=Callable[..., object])


def meets(*chosen: Algorithm) -> Callable[[Test], Test]:
    """Marks a test as the one that tries these algorithms, and gives it one after the other as ``chosen``."""
    EXERCISED.update(a.name for a in chosen)
    return pytest.mark.parametrize("chosen", chosen, ids=lambda a: a.name)


def meets_each_digest(*chosen: Algorithm) -> Callable[[Test], Test]:
    """As ``meets``, with every ``digest`` that each of them allows."""
    EXERCISED.update(a.name for a in chosen)
    return pytest.mark.parametrize(("chosen", "digest"), [(a, d) for a in chosen for d in a.digests or (a.digest,)], ids=str_of)


def str_of(value: Algorithm | str) -> str:
    return value if isinstance(value, str) else value.name


def entries(wanted: Callable[[Algorithm], bool]) -> Iterator[Algorithm]:
    """Of the registry, those that are ``wanted`` and that no line of ``CANNOT`` takes out."""
    return (a for a in REGISTRY.values() if wanted(a) and not any(fnmatch(a.name, pattern) for pattern in CANNOT))


def digest_name(name: str) -> str:
    """What openssl calls a digest."""
    return {"BLAKE2b": "BLAKE2b512", "BLAKE2s": "BLAKE2s256"}.get(name, name.replace("SHA-", "SHA").replace("/", "-"))


@cache
def _listed(what: str) -> frozenset[str]:
    """What the program lists, in small letters; empty where it has no such list."""
    said = subprocess.run(["openssl", "list", *what.split()], capture_output=True, check=False)
    return frozenset(re.split(r"[\s{},@]+", said.stdout.decode().lower()))


@cache
def _options(command: str) -> frozenset[str]:
    said = subprocess.run(["openssl", command, "-help"], capture_output=True, check=False)
    return frozenset((said.stdout + said.stderr).decode().split())


class Openssl:
    """The program, with a folder for what it wants as files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, 0

    def __call__(self, *arguments: object, given: bytes = b"") -> bytes:
        done = self._run(arguments, given)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def refuses(self, *arguments: object, given: bytes = b"") -> str:
        """What it says about it."""
        done = self._run(arguments, given)
        assert done.returncode != 0
        return (done.stdout + done.stderr).decode(errors="replace")

    def file(self, data: bytes) -> Path:
        self._files += 1
        path = self._folder / f"{self._files}"
        path.write_bytes(data)
        return path

    def needs(self, what: str, name: str) -> None:
        """Skips the test unless ``openssl list -WHAT`` has ``name``."""
        if name.lower() not in _listed(f"-{what}"):
            pytest.skip(f"this openssl is too old: `openssl list -{what}` has no {name}")

    def needs_option(self, command: str, option: str) -> None:
        if option not in _options(command):
            pytest.skip(f"this openssl is too old: `openssl {command}` has no {option}")

    def private_key(self, *arguments: object) -> bytes:
        """A fresh key of its own, PKCS#8 DER."""
        return self("pkcs8", "-topk8", "-nocrypt", "-outform", "DER", given=self("genpkey", *arguments))

    @staticmethod
    def _run(arguments: tuple[object, ...], given: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["openssl", *map(str, arguments)], input=given, capture_output=True, timeout=60, check=False)


class CardKey(NamedTuple):
    """A key in the card, by its handle."""

    function: Function
    handle: int
    public: bytes  # DER; of a secret key: empty

    def run(self, verb: Verb, data: bytes = b"", **how: object) -> bytes:
        return self.function.run(StreamRequest(verb, **how), data, handle=self.handle)  # type: ignore[arg-type]


def _held(function: Function, handle: int, row: EscrowRow) -> CardKey:
    return CardKey(function, handle, msgspec.json.decode(row.attributes, type=VersionAttributes).public_key)


def brought(function: Function, name: str, material: bytes, *, bare: bool = False) -> CardKey:
    """A key that was made outside and imported, sealed to the card."""
    return _held(function, *function.bring(name, function.seal(name, bytes(material)), bare=bare))


def made(function: Function, name: str) -> CardKey:
    """A key that the card made."""
    return _held(function, *function.generate(name))
