"""Published vectors: how their files are read, and which algorithms the tests have shown them for."""

import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import cryptography_vectors

SHOWN: set[str] = set()
"""Names of algorithms whose tests are marked with ``shows``."""

Test = TypeVar("Test", bound=Callable[..., object])


def shows(*names: str) -> Callable[[Test], Test]:
    """Marks a test as the one that holds these algorithms against published vectors."""
    SHOWN.update(names)
    return lambda test: test


def lines(name: str) -> list[str]:
    """A file of the package ``cryptography_vectors``."""
    with cryptography_vectors.open_vector_file(name, "r") as file:
        return [line.strip() for line in file.read().splitlines()]


def records(name: str, *, begins: str = "", keeps: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """The records of a NIST-style file, each with the ``[section]`` lines before it.

    They are separated by empty lines, or where the field ``begins`` comes again; what is in ``keeps`` holds for those after it, too.
    """
    section: dict[str, str] = {}
    record: dict[str, str] = {}
    kept: dict[str, str] = {}
    for text in [*lines(name), ""]:
        if match := re.fullmatch(r"\[(.+?)(?: = (.+))?\]", text):
            if record:
                yield {**section, **kept, **record}
                record = {}
            section = {**(section if match[2] else {}), match[1]: match[2] or ""}
        elif not text:
            if record and not begins:
                yield {**section, **kept, **record}
                record = {}
        elif text == "FAIL":
            record["FAIL"] = ""
        elif " = " in text + " " and not text.startswith("#"):
            key, _, value = (text + " ").partition(" = ")
            if begins and key.strip() == begins and record:
                yield {**section, **kept, **record}
                record = {}
            record[key.strip()] = value.strip()
            if key.strip() in keeps:
                kept[key.strip()] = value.strip()
    if record:
        yield {**section, **kept, **record}


def octets(record: dict[str, str], *names: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(record[name]) for name in names)
