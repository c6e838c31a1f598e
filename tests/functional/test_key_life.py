"""The life of a key by the command line, on a real cloud with its real KMC."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.settings import Settings
from tests.functional.test_error_paths import failed
from tests.support import Consumer, command, eventually, profile_file


def test_a_key_from_its_name_to_its_end(plugged: Consumer, tmp_path: Path) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)
    made = command("key", "create", "--max-uses", "5", "--rotate-days", "90", "--profile", profile, "--json").document
    key = made["id"]
    assert (made["terms"]["max_uses"], made["terms"]["rotation_s"]) == (5, 90 * 86400)
    assert command("key", "alias", "set", "orders", key, "--profile", profile).status == 0
    assert command("key", "update", "alias/orders", "--label", "new", "--tag", "stage=test", "--profile", profile).status == 0
    (tmp_path / "plain").write_bytes(b"data")
    sealed = tmp_path / "sealed"
    encrypt = ("encrypt", "--key", "alias/orders", "--in", tmp_path / "plain", "--out", sealed, "--profile", profile, "--json")
    assert command(*encrypt).status == 0
    assert command("key", "rotate", "alias/orders", "--profile", profile).status == 0
    shown = command("key", "show", "alias/orders", "--profile", profile, "--json").document
    assert (shown["label"], shown["tags"], shown["aliases"], shown["used"]) == ("new", {"stage": "test"}, ["orders"], 1)
    assert command("key", "trim", key, "--before", "2", "--yes", "--profile", profile).status == 0
    decrypt = ("decrypt", "--in", sealed, "--out", tmp_path / "out", "--profile", profile, "--json")
    failed(command(*decrypt), "key-version-trimmed")
    assert command(*encrypt).status == 0
    pending = command("key", "delete", key, "--yes", "--profile", profile, "--json").document
    assert pending["state"] == "pending-deletion"
    failed(command(*decrypt), "key-pending-deletion")
    assert command("key", "cancel-deletion", key, "--profile", profile).status == 0
    failed(command(*decrypt), "key-disabled")
    assert command("key", "enable", key, "--profile", profile).status == 0
    assert command(*decrypt).status == 0
    assert (tmp_path / "out").read_bytes() == b"data"
    export = ("key", "export", key, "--to", write_key(tmp_path), "--out", tmp_path / "x", "--profile", profile, "--json")
    failed(command(*export), "key-not-exportable")
    assert command("key", "delete", key, "--now", "--yes", "--profile", profile, "--json").document["state"] == "deleted"
    failed(command(*decrypt), "key-deleted")
    failed(command(*encrypt), "alias-unknown")
    assert command("key", "alias", "list", "--profile", profile, "--json").document == []


def write_key(folder: Path) -> Path:
    public = rsa.generate_private_key(65537, 2048).public_key()
    file = folder / "public.pem"
    file.write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return file


def test_what_falls_due_is_done_by_a_vcm(plugged: Consumer) -> None:
    """The KMC's own index leads the VCM to it."""
    with plugged.client() as client:
        key = client.create_key("AES-256-GCM", terms=KeyTerms(rotation_s=1.0))
        eventually(lambda: client.describe_key(key.id).version > 1, within=3 * Settings().chores_s, what="the key is rotated")
        client.disable_key(key.id)
