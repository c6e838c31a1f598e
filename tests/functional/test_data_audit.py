"""Operations on data on a real cloud: the audit log has them, and each key knows when it was used last."""

import time
from pathlib import Path

import msgspec
import pytest

from cipherfleet import SyncClient
from cipherfleet.contract.settings import AuditData
from tests.support import QUICK, TestCloud, cloud_in, command, eventually, profile_file, refusal


@pytest.mark.parametrize("data", ["counted", "full"])
def test_uses_are_in_the_log_and_at_the_key(tmp_path: Path, data: AuditData) -> None:
    settings = msgspec.structs.replace(QUICK, audit_data=data, audit_flush_s=0.3)
    with cloud_in(tmp_path, machines=1, settings=settings) as cloud:
        consumer = cloud.enrol("acme")
        consumer.plug_in()
        began = time.time()
        profile = profile_file(consumer.sign_in(), tmp_path)
        with SyncClient(profile) as client:
            key = client.create_key("AES-256-GCM").id
            for _ in range(3):
                client.encrypt(key, b"x")

            def entries() -> list[tuple[str, str, int]]:
                shown = command("audit", "show", "--event", "data-encrypt", "--profile", profile, "--json").document
                return [(line["subject"], line["outcome"], line["count"]) for line in shown]

            expected = [(f"{key}/1", "ok", 3)] if data == "counted" else [(f"{key}/1", "asked", 1)] * 3
            eventually(lambda: sum(count for _, _, count in entries()) == 3, what="the VCM's report")
            if data == "full":
                assert entries() == expected
            else:
                assert {(subject, outcome) for subject, outcome, _ in entries()} == {(f"{key}/1", "ok")}
            eventually(lambda: (client.describe_key(key).uses_counted or 0) >= 3, what="the uses")
            described = client.describe_key(key)
            assert described.uses_counted == 3
            assert began - 1 < (described.last_used_at or 0) <= time.time()
        verified = command("audit", "verify", "--profile", profile, "--json")
        assert verified.status == 0, verified.stdout
        kept = tmp_path / "log.jsonl"
        assert command("audit", "export", "--out", kept, "--profile", profile).status == 0
        assert command("audit", "verify", "--file", kept, "--json").status == 0
        lines = kept.read_bytes().splitlines()
        kept.write_bytes(b"\n".join(lines[:3] + lines[4:]) + b"\n")
        broken = command("audit", "verify", "--file", kept, "--json")
        assert (broken.status, broken.document["error"]["code"]) == (1, "audit-broken")
        assert command("audit", "verify", "--ukey", consumer.ukey, "--pin-file", pin(tmp_path, consumer.pin), "--json").status == 0
        consumer.pull()


def test_what_was_done_just_before_the_end_is_in_the_log(own_cloud: TestCloud) -> None:
    """The Ukey is pulled long before the next report (``audit_flush_s``, 30 s); so is service stopped by the operator."""
    consumer = own_cloud.enrol("acme")

    def uses() -> int:
        shown = command("audit", "show", "--event", "data-encrypt", "--consumer", "acme", "--state", own_cloud.cloud.state, "--json")
        return sum(line["count"] for line in shown.document if line["outcome"] == "ok")

    consumer.plug_in()
    with SyncClient(consumer.sign_in()) as client:
        key = client.create_key("AES-256-GCM").id
        for _ in range(3):
            client.encrypt(key, b"x")
        assert uses() == 0  # not told yet
        consumer.pull()
        eventually(lambda: uses() == 3, what="the last words of a VCM whose Ukey is gone")
        eventually(lambda: not consumer.vcms(), what="it is gone")
        consumer.put_back()
        eventually(lambda: not refusal(lambda: client.encrypt(key, b"x")), within=40.0, what="service is back")
        done = 4
        vcm = consumer.vcms()[0].id
        assert command("vcm", "delete", vcm, "--force", "--state", own_cloud.cloud.state).status == 0
        eventually(lambda: uses() == done, what="the last words of a VCM that was deleted")


def pin(folder: Path, text: str) -> Path:
    path = folder / "pin"
    path.write_text(f"{text}\n")
    return path
