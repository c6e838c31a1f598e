"""Keys in pages: all of them in the order of creation, as the log has them; or those that the KMC's index finds, each checked."""

import base64
import binascii

from cipherfleet.channel import codec
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.key_life import TAG, tag_term
from cipherfleet.contract.kmc_api import KeySearch
from cipherfleet.contract.vcm_api import KeyDescription, KeyQuery

MAX_TOKEN_BYTES = 2048


async def find(escrow: Escrow, query: KeyQuery) -> tuple[list[KeyId], str]:
    """The keys of one page, and the token of the next, empty at the end. Raises ``Malformed`` for a token that is none of ours."""
    if query.everything:
        return _next(escrow, query)
    after = _decode(query.after) if query.after else None
    found = await escrow.search(KeySearch(query.label, query.state, query.algorithm, query.terms, after, query.limit))
    return list(found.keys), "" if found.after is None else _encode(*found.after)


def fits(query: KeyQuery, key: KeyDescription) -> bool:
    """The KMC's answer is a hint: whether the key is one of those that were asked for. Of other terms than tags the asker judges."""
    tags = {tag_term(name, value) for name, value in key.tags.items()}
    named = key.label.startswith(query.label) and query.state in ("", key.state) and query.algorithm in ("", key.algorithm)
    return named and tags.issuperset(term for term in query.terms if term.startswith(TAG))


def _next(escrow: Escrow, query: KeyQuery) -> tuple[list[KeyId], str]:
    epoch = str(escrow.seen.epoch if escrow.seen is not None else 0)
    position = 0
    if query.after:
        of_epoch, position = _decode(query.after)
        if of_epoch != epoch or position < 0:
            raise Malformed("the list has begun anew since this page", "ask for the first page")
    keys = list(escrow.keys_from(position, query.limit))
    end = position + len(keys)
    return keys, _encode(epoch, end) if keys and end < escrow.keys else ""


def _encode(text: str, number: int) -> str:
    return base64.urlsafe_b64encode(codec.encode((text, number))).decode()


def _decode(token: str) -> tuple[str, int]:
    try:
        raw = base64.b64decode(token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Malformed("this is not the token of a page") from exc
    return codec.decode(raw, tuple[str, int], what="the token of a page", limit=MAX_TOKEN_BYTES)
