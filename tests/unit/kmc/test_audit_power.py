"""Power is lost amid a stream of events: a process that writes as the KMC does is killed, again and again, and the log is whole."""

import subprocess
import sys
from pathlib import Path

from cipherfleet.contract.audit import AuditQuery, verify_audit
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.state.database import Database

KILLS = 8
WRITER = """
import asyncio, sys
from pathlib import Path
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.state.database import Database

async def main():
    database = Database.open(Path(sys.argv[1]), FILE, MIGRATIONS)
    number = int(sys.argv[2])
    while True:
        number += 1
        def commit(connection):
            store.add_authority(connection, f"n{number}", b"pem")
            audit.append(connection, "alice", at=1.0, actor="actor", event="event", subject=f"n{number}")
        await database.write(commit)
        print(number, flush=True)

asyncio.run(main())
"""


async def test_an_entry_is_there_if_and_only_if_its_change_is(tmp_path: Path) -> None:
    acknowledged = 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(acknowledged + 1000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:  # noqa: ASYNC220 - nothing else runs here
            assert writer.stdout is not None
            for _ in range(20):
                acknowledged = int(writer.stdout.readline())
            writer.kill()  # amid the next one
        database = Database.open(tmp_path, FILE, MIGRATIONS)
        entries = await database.read(lambda connection: audit.read(connection, AuditQuery("alice")))  # there are far fewer than a page
        head = await database.read(lambda connection: audit.head(connection, "alice"))
        changes = await database.read(store.read_authorities)
        await database.close()
        verify_audit(entries, {"alice": (head.sequence, head.digest)})
        assert {entry.subject for entry in entries} == set(changes)
        assert f"n{acknowledged}" in changes
        acknowledged = max(int(name[1:]) for name in changes)
