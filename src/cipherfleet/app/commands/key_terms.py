"""Options for what a key is made to: when it may be used, how often, how it is rotated."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.key_life import DAY_S

NotBefore = Annotated[str | None, typer.Option(metavar="TIME", help="Refuse every use before (ISO 8601, UTC).", show_default=False)]
NotAfter = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Encrypt and sign nothing from then on; decrypting and verifying go on.", show_default=False),
]
RotateDays = Annotated[float | None, typer.Option(min=0, help="A new version every so many days.", show_default=False)]
RotateUses = Annotated[int | None, typer.Option(min=0, help="A new version after about so many uses.", show_default=False)]
MaxUses = Annotated[int | None, typer.Option(min=0, help="How often it may encrypt or sign, in all.", show_default=False)]


def seconds(text: str | None) -> float | None:
    """Unix seconds of an ISO 8601 time, UTC unless it says otherwise; "never" is 0. Raises ``Malformed``."""
    if text is None:
        return None
    if text == "never":
        return 0.0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise Malformed(f"{text!r} is no time", "give it like 2027-01-31 or 2027-01-31T12:00:00, or never") from exc
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def period(days: float | None) -> float | None:
    return None if days is None else days * DAY_S
