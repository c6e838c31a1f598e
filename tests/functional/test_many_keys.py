"""Many keys on a real cloud: the command line, and a KMC that is killed in the middle of batches."""

import base64
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from cipherfleet import SyncClient
from cipherfleet.contract.errors import CipherfleetError
from tests.functional.test_durability import bring_back
from tests.support import Consumer, TestCloud, command, eventually, persistently, profile_file

BATCH = 500


def test_batches_and_lists_by_the_command_line(plugged: Consumer, tmp_path: Path) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)

    def key(*arguments: object) -> list[dict[str, Any]]:
        return command("key", *arguments, "--profile", profile, "--json").document  # type: ignore[no-any-return]

    before = [one["id"] for one in key("list")]
    made = key("create", "--count", 3, "--label", "many", "--max-uses", 7, "--tag", "env=test", "--tag", "team=a")
    assert [(one["terms"]["max_uses"], one["tags"]) for one in made] == [(7, {"env": "test", "team": "a"})] * 3
    assert [(one["algorithm"], one["label"]) for one in made] == [("AES-256-GCM", "many")] * 3
    lines = tmp_path / "keys.jsonl"
    brought: list[dict[str, Any]] = [
        {"algorithm": "HMAC-SHA-256", "material": base64.b64encode(os.urandom(32)).decode(), "label": f"b{n}"} for n in range(3)
    ]
    brought[2] |= {"terms": {"max_uses": 5}, "tags": {"env": "prod"}}
    lines.write_text("\n".join(json.dumps(line) for line in brought) + "\n\n")
    imported = key("import", "--batch", lines)
    assert [(one["label"], one["imported"]) for one in imported] == [("b0", True), ("b1", True), ("b2", True)]
    assert imported[2]["tags"] == {"env": "prod"}
    assert imported[2]["terms"]["max_uses"] == 5
    everything = [one["id"] for one in key("list")]
    assert everything == before + [one["id"] for one in made + imported]
    assert [one["id"] for one in key("list", "--limit", 1)] == everything[:1]
    assert [one["label"] for one in key("list", "--label", "b", "--algorithm", "HMAC-SHA-256")] == ["b0", "b1", "b2"]
    command("key", "disable", imported[1]["id"], "--profile", profile)
    assert [one["label"] for one in key("list", "--state", "disabled", "--label", "b")] == ["b1"]
    assert "b2" in command("key", "list", "--all", "--profile", profile).stdout
    lines.write_text(json.dumps(brought[0]) + "\n" + json.dumps({"algorithm": "AES-256-GCM"}) + "\n")
    for arguments in (
        ("import", "--batch", lines),
        ("import", "AES-256-GCM", "--batch", lines),
        ("import", "--batch", lines, "--max-uses", 1),
        ("create", "--tag", "env"),
        ("import",),
        ("list", "--all", "--limit", 2),
    ):
        refused = command("key", *arguments, "--profile", profile, "--json")
        assert (refused.status, refused.document["error"]["code"]) == (1, "malformed")
    assert len(key("list")) == len(everything)


def test_a_kmc_that_is_killed_leaves_all_of_a_batch_or_none(own_cloud: TestCloud) -> None:
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile = consumer.sign_in()
    acknowledged: list[str] = []
    asked: list[str] = []
    stop = threading.Event()

    def make_batches() -> None:
        with SyncClient(profile) as client:
            while not stop.is_set():
                label = f"batch {len(asked)}"
                asked.append(label)
                try:
                    client.create_keys("AES-256-GCM", [label] * BATCH)
                    acknowledged.append(label)
                except CipherfleetError:
                    stop.wait(0.02)

    maker = threading.Thread(target=make_batches, daemon=True)
    maker.start()
    with SyncClient(profile) as client:
        for _ in range(3):
            count = len(acknowledged)
            eventually(lambda: len(acknowledged) > count, within=30.0, what="a batch is made")  # noqa: B023
            own_cloud.kill("kmc")
            bring_back(own_cloud, consumer, client)
        stop.set()
        maker.join(60)
        found = Counter(key.label for key in persistently(client.list_keys))
    assert set(found.values()) == {BATCH}
    assert set(acknowledged) <= set(found) <= set(asked)
