"""Who may do what, on a real cloud: grants that the Ukey signed."""

from pathlib import Path

import pytest

from cipherfleet import SyncClient
from cipherfleet.contract.errors import ContextNotGranted, NotPermitted
from tests.support import Consumer, TestCloud, command


def test_a_grant_holds_for_its_key_and_context_alone(shared_cloud: TestCloud, plugged: Consumer, tmp_path: Path) -> None:
    pin, out = tmp_path / "pin", tmp_path / "granted.json"
    pin.write_text(plugged.pin)
    ukey = ("--ukey", plugged.ukey, "--pin-file", pin, "--json")
    with plugged.client("owner") as owner:
        mine, other = owner.create_key("AES-256-GCM").id, owner.create_key("AES-256-GCM").id
        foreign = owner.encrypt(other, b"other")
    made = command("app", "add", "granted", "--out", out, "--grant", f"encrypt,decrypt:key={mine},context=c,expires=1h", *ukey)
    assert (made.status, made.document["rights"]) == (0, [])
    with SyncClient(out) as granted:
        sealed = granted.encrypt(mine, b"data", context=b"c")
        assert granted.decrypt(sealed, context=b"c") == b"data"
        with pytest.raises(ContextNotGranted):
            granted.encrypt(mine, b"data")
        for refused in (lambda: granted.decrypt(foreign, context=b"c"), lambda: granted.random(1), lambda: granted.list_keys()):
            with pytest.raises(NotPermitted):
                refused()
    again = command("app", "grant", "--profile", out, "--allow", "random", "--grant", f"show:key={other}", *ukey)
    assert again.status == 0, again
    with SyncClient(out) as granted:
        assert granted.describe_key(other).id == other
        assert len(granted.random(3)) == 3
        with pytest.raises(NotPermitted):
            granted.decrypt(sealed, context=b"c")
    listed = command("app", "list", "--state", shared_cloud.cloud.state, "--json").document
    (entry,) = [a for a in listed if a["name"] == "granted" and a["consumer"] == plugged.name]
    assert (entry["rights"], entry["grants"]) == (["random"], [{"operations": ["show"], "keys": [other]}])
    bad = command("app", "grant", "--profile", out, "--grant", "fly", *ukey)
    assert (bad.status, bad.document["error"]["code"]) == (1, "malformed")
