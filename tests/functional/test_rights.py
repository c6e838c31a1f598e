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


def test_an_administrator_of_a_key_delegates_within_its_own_rights(shared_cloud: TestCloud, plugged: Consumer, tmp_path: Path) -> None:
    pin, lead, temp = tmp_path / "pin", tmp_path / "lead.json", tmp_path / "temp.json"
    pin.write_text(plugged.pin)
    ukey = ("--ukey", plugged.ukey, "--pin-file", pin, "--json")
    with plugged.client("keeper") as keeper:
        key = keeper.create_key("AES-256-GCM").id
    assert command("app", "add", "lead", "--out", lead, "--grant", f"encrypt,decrypt:key={key},delegate", *ukey).status == 0
    assert command("app", "add", "temp", "--out", temp, "--allow", "random", *ukey).status == 0
    by_lead = ("--profile", lead, "--json")
    wide = command("key", "delegate", key, "--to", "temp", "--may", "sign", *by_lead)
    assert (wide.status, wide.document["error"]["code"]) == (1, "delegation-too-wide")
    made = command("key", "delegate", key, "--to", "temp", "--may", "encrypt:expires=1h,pair=tenant:a", *by_lead)
    assert (made.status, made.document["delegate"], made.document["state"]) == (0, "temp", "active")
    with SyncClient(temp) as client:
        sealed = client.encrypt(key, b"data", context=b'{"tenant": "a"}')
        with pytest.raises(ContextNotGranted):
            client.encrypt(key, b"data")
        with pytest.raises(NotPermitted):
            client.decrypt(sealed, context=b'{"tenant": "a"}')
    further = command("key", "delegate", key, "--to", "lead", "--may", "encrypt", "--profile", temp, "--json")
    assert (further.status, further.document["error"]["code"]) == (1, "delegation-too-wide")
    (listed,) = command("key", "delegations", key, "--profile", temp, "--json").document
    assert (listed["delegator"], listed["delegate"], listed["state"]) == ("lead", "temp", "active")
    assert command("key", "delegate", key, "--to", "temp", "--revoke", *by_lead).document["state"] == "revoked"
    with SyncClient(temp) as client, pytest.raises(NotPermitted):
        client.encrypt(key, b"data", context=b'{"tenant": "a"}')
    assert command("key", "delegate", key, "--to", "temp", "--may", "encrypt", *by_lead).status == 0
    with SyncClient(temp) as client:
        client.encrypt(key, b"data")
        assert command("app", "revoke", "lead", *ukey, "--state", shared_cloud.cloud.state).status == 0
        with pytest.raises(NotPermitted):
            client.encrypt(key, b"data")
    log = command("audit", "show", "--consumer", plugged.name, "--key", key, "--state", shared_cloud.cloud.state, "--json").document
    events = [entry["event"] for entry in (log["entries"] if isinstance(log, dict) else log)]
    assert [event for event in events if event.startswith("key-delegat")] == ["key-delegated", "key-delegation-revoked", "key-delegated"]
