"""What the operator does when something was stolen: a Ukey, or the credentials of a platform process."""

import shutil

from cipherfleet import SyncClient
from tests.support import Consumer, TestCloud, command, eventually, refusal


def test_a_stolen_ukey_is_revoked(shared_cloud: TestCloud, consumer: Consumer) -> None:
    consumer.plug_in()
    profile = consumer.sign_in()
    state = shared_cloud.cloud.state
    with SyncClient(profile) as client:
        client.random(1)
        assert command("consumer", "revoke", consumer.name, "--state", state).status != 0  # nobody said yes
        client.random(1)
        assert command("consumer", "revoke", consumer.name, "--yes", "--state", state).status == 0
        eventually(lambda: refusal(lambda: client.random(1)), within=2.0, what="the service is off")
    listed = command("consumer", "list", "--state", state, "--json").document
    assert [entry["state"] for entry in listed if entry["name"] == consumer.name] == ["revoked"]
    eventually(lambda: consumer.vcms() == [], what="its VCMs are deleted")
    consumer.pull()
    consumer.put_back()
    assert refusal(lambda: consumer.plug_in(timeout=10))
    again = command("consumer", "revoke", consumer.name, "--state", state, "--json")
    assert (again.status, again.document) == (0, {"consumer": consumer.name, "state": "revoked"})


def test_platform_processes_start_again_with_new_certificates(own_cloud: TestCloud) -> None:
    """Their older certificates are revoked by that; the others, and the consumer's service, go on."""
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    own_cloud.kill("management")
    shutil.rmtree(own_cloud.cloud.state / "credentials" / "management")
    own_cloud.kill("machine")
    shutil.rmtree(own_cloud.cloud.state / "credentials" / "m1")
    own_cloud.up()
    consumer.plug_in()
    assert own_cloud.platform().machines
    eventually(lambda: consumer.service == "on", what="service on")
