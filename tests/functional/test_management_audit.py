"""What the management platform decides, on a real cloud: in the consumer's audit log, also when it is killed before it could tell."""

import os
import signal
from contextlib import closing
from pathlib import Path
from sqlite3 import connect

from tests.support import TestCloud, command, eventually


def told(cloud: TestCloud, event: str) -> list[str]:
    shown = command("audit", "show", "--consumer", "acme", "--event", event, "--state", cloud.cloud.state, "--json").document
    return [line["subject"] for line in shown]


def waiting(cloud: TestCloud) -> int:
    with closing(connect(f"file:{Path(cloud.cloud.state) / 'management' / 'inventory.sqlite'}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM outbox").fetchone()[0])


def test_a_decision_is_told_though_management_was_killed_before_the_kmc_had_it(own_cloud: TestCloud) -> None:
    state = own_cloud.cloud.state
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    vcm = consumer.vcms()[0].id
    eventually(lambda: told(own_cloud, "vcm-ordered") == [vcm], what="the order is told")
    eventually(lambda: waiting(own_cloud) == 0, what="and marked")
    [kmc] = own_cloud.processes("kmc")
    os.kill(kmc.pid, signal.SIGSTOP)
    try:
        assert command("vcm", "limits", vcm, "--keys", "77", "--state", state).status == 0
        own_cloud.kill("management")
        assert waiting(own_cloud) == 1
    finally:
        os.kill(kmc.pid, signal.SIGCONT)
    own_cloud.up()
    eventually(lambda: told(own_cloud, "vcm-limits-set") != [], within=30.0, what="the next life tells it")
    eventually(lambda: waiting(own_cloud) == 0, what="and marks it")
    [limits] = told(own_cloud, "vcm-limits-set")
    assert limits.startswith(f"{vcm}: ")
    assert "keys 77" in limits
    assert command("audit", "verify", "--state", state).status == 0
    consumer.pull()
