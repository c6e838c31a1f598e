"""A cloud whose VCMs are forked: it serves, and a zygote that ends is a VCM that is replaced."""

from pathlib import Path

import msgspec
import psutil

from cipherfleet.contract.errors import CipherfleetError
from tests.support import QUICK, cloud_in, command, eventually


def test_a_cloud_with_a_zygote_serves_and_outlives_it(tmp_path: Path) -> None:
    with cloud_in(tmp_path, machines=1, settings=msgspec.structs.replace(QUICK, launcher="zygote")) as cloud:
        consumer = cloud.enrol("acme")
        consumer.plug_in()
        [vcm] = consumer.vcms()
        isolation = cloud.vcm(vcm.id).isolation
        assert isolation is not None
        assert isolation.launcher == "zygote"
        assert {"net", "pid", "mnt", "ipc", "user", "uts"} <= set(isolation.namespaces)
        assert (isolation.read_only_root, isolation.seccomp, isolation.capabilities) == (True, True, "0")
        with consumer.client() as client:
            key = client.create_key("AES-256-GCM").id
            sealed = client.encrypt(key, b"kept")
            [entry] = cloud.processes("vcm")
            zygote = psutil.Process(entry.pid).parent()
            assert zygote is not None
            assert zygote.cmdline()[-1] == "zygote"
            zygote.kill()

            def served() -> bool:
                try:
                    return client.decrypt(sealed) == b"kept"
                except CipherfleetError:
                    return False

            eventually(lambda: vcm.id not in {v.id for v in consumer.vcms()}, within=20, what="the VCM is given up")
            eventually(served, within=30, what="another VCM serves")


def test_the_launcher_can_be_changed(tmp_path: Path) -> None:
    with cloud_in(tmp_path, machines=1) as cloud:
        assert cloud.cloud.record.settings.launcher == "auto"
        for launcher in ("zygote", "auto"):
            assert command("up", "--detach", "--launcher", launcher, "--state", cloud.cloud.state, "--json").status == 0
            assert cloud.cloud.record.settings == msgspec.structs.replace(QUICK, launcher=launcher)
