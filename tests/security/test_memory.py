"""No plaintext CMK or DEK anywhere but in the card: not in another process's memory, not in any file, log or database."""

import os

import pytest

from tests.security.chain import hsm_keys, in_files, in_memory, key_chain, reversed_too
from tests.support import TestCloud, eventually


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="reading the memory of other processes needs root")
def test_keys_are_in_the_cards_memory_alone(own_cloud: TestCloud) -> None:
    consumer = own_cloud.enrol("acme")
    vcm = consumer.plug_in()["vcm"]
    with consumer.client() as client:
        for _ in range(3):
            key = client.create_key("AES-256-GCM")
            assert client.decrypt(client.encrypt(key.id, b"used")) == b"used"
        planted = os.urandom(32)
        mine = client.import_key("AES-256-GCM", planted)
        assert client.decrypt(client.encrypt(mine.id, b"used")) == b"used"
        chain = key_chain(own_cloud, consumer)
        secrets = {**chain.secrets(), "planted key": planted}
        assert len(chain.deks) == 4
        machine = str(own_cloud.vcm(vcm).vcm.machine)
        [serving] = [p for p in own_cloud.processes("card") if machine in p.id]
        assert in_memory(serving.pid, secrets) >= {"wrapping key", "planted key", *(f"DEK {k}" for k in chain.deks)}, "positive control"
        for process in own_cloud.processes():
            if process.pid == serving.pid:
                continue
            found = in_memory(process.pid, secrets)
            assert not found, f"{process.role} {process.id} holds {found}"
            if process.role not in ("terminal", "card"):
                assert not in_memory(process.pid, {"Ukey share": chain.ukey_share}), process.role
            if process.role not in ("hsm", "card"):
                assert not in_memory(process.pid, {"HSM share": chain.hsm_share}), process.role
        terminal = own_cloud.processes("terminal")[0]
        assert in_memory(terminal.pid, {"Ukey share": chain.ukey_share}), "positive control"
        everything = {**secrets, "Ukey share": chain.ukey_share, "HSM share": chain.hsm_share}
        assert in_files(own_cloud.folder, everything) == set()
        roots = hsm_keys(own_cloud)
        assert {"root-key", "kmc-signing", "root-ca", "platform-ca", "domain-ca/acme"} <= set(roots)
        [hsm] = own_cloud.processes("hsm")
        assert in_memory(hsm.pid, roots) == set(roots), "positive control"
        for process in own_cloud.processes():
            if process.role != "hsm":
                assert not in_memory(process.pid, reversed_too(roots)), f"{process.role} {process.id}"
        assert in_files(own_cloud.folder, reversed_too(roots)) == set()
    consumer.pull()
    eventually(lambda: not in_memory(serving.pid, secrets), within=8.0, what="the card forgets")
