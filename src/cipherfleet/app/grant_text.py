"""A grant as the command line has it: ``encrypt,decrypt:key=ID,expires=30d,context=TEXT,rate=10``."""

import base64
import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.grants import Grant, check_grants

SHAPE = (
    "OPERATION,...[:key=ID][,label=PATTERN][,expires=30d|12h|2030-12-31][,context=TEXT|base64:...][,pair=NAME:VALUE][,rate=N][,delegate]"
)
_SECONDS = {"d": 86400, "h": 3600, "m": 60}


def parse_grant(text: str, now: float) -> Grant:
    """Raises ``Malformed``. ``key``, ``label`` and ``pair`` may stand several times; values hold no comma."""
    operations, _, constraints = text.partition(":")
    told: dict[str, Any] = {"operations": [part.strip() for part in operations.split(",")]}
    for part in constraints.split(",") if constraints else ():
        name, equals, value = part.partition("=")
        name = name.strip()
        if name == "delegate" and not equals and "delegate" not in told:
            told["delegate"] = True
            continue
        if not equals or not value:
            raise Malformed(f"{part!r} is no constraint of a grant", SHAPE)
        if name in ("expires", "context", "rate") and _FIELDS[name] in told:
            raise Malformed(f"a grant has one {name}", SHAPE)
        match name:
            case "key" | "label":
                told.setdefault(f"{name}s", []).append(value)
            case "expires":
                told["not_after"] = _moment(value, now)
            case "context":
                told["context"] = _context(value)
            case "pair":
                key, colon, wanted = value.partition(":")
                if not colon or key in told.setdefault("context_pairs", {}):
                    raise Malformed(f"{value!r} is no pair NAME:VALUE, or stands twice", SHAPE)
                told["context_pairs"][key] = wanted
            case "rate":
                told["rate"] = _number(value)
            case _:
                raise Malformed(f"{name!r} is no constraint of a grant", SHAPE)
    try:
        grant = msgspec.convert(told, Grant)
    except msgspec.ValidationError as exc:
        raise Malformed(f"the grant {text!r} is none: {exc}", SHAPE) from exc
    check_grants((grant,))
    return grant


def show_grant(grant: Grant) -> str:
    """For people, in the same shape."""
    parts = [*(f"key={key}" for key in grant.keys), *(f"label={label}" for label in grant.labels)]
    if grant.not_after:
        parts.append(f"expires={datetime.fromtimestamp(grant.not_after, UTC):%Y-%m-%dT%H:%MZ}")
    if grant.context is not None:
        parts.append(f"context=base64:{base64.b64encode(grant.context).decode()}")
    parts += [f"pair={name}:{value}" for name, value in grant.context_pairs.items()]
    if grant.rate:
        parts.append(f"rate={grant.rate:g}")
    if grant.delegate:
        parts.append("delegate")
    return ",".join(grant.operations) + (":" + ",".join(parts) if parts else "")


_FIELDS = {"expires": "not_after", "context": "context", "rate": "rate"}


def _moment(text: str, now: float) -> int:
    found = re.fullmatch(r"([0-9]{1,6})([dhm])", text)
    try:
        moment = now + int(found[1]) * _SECONDS[found[2]] if found else datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError as exc:
        raise Malformed(f"{text!r} is no time", "say 30d, 12h, 10m or a date (UTC)") from exc
    if moment <= now:
        raise Malformed(f"the grant would have expired at {text}")
    return int(moment)


def _context(text: str) -> bytes:
    if not text.startswith("base64:"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("base64:"), validate=True)
    except ValueError as exc:
        raise Malformed("the grant's context is no base64") from exc


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError as exc:
        raise Malformed(f"{text!r} is no rate", "say operations per second") from exc
    if not 0 < number <= 1e6:
        raise Malformed(f"{text!r} is no rate", "say operations per second, above 0")
    return number
