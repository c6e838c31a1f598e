"""The KMC killed again and again under changes of every kind: what was acknowledged stands, and the audit log is whole."""

import random
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import pytest

from cipherfleet import SyncClient
from cipherfleet.channel import signing
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.statements import DestructionStatement
from tests.functional.test_durability import bring_back
from tests.support import TestCloud, command, eventually, persistently

KILLS = (("kmc",), ("kmc", "hsm")) * 4


@dataclass
class Acknowledged:
    """What a client was told of one key. ``state`` is the newest answer, empty once a later change got none."""

    version: int = 1
    state: str = "enabled"
    alias: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    ciphertexts: list[bytes] = field(default_factory=list)


class Changer:
    """Leads keys through their lives, one after the other, until told to stop; a refusal ends a key's life early."""

    def __init__(self, profile: Profile, number: int) -> None:
        self._profile, self._number = profile, number
        self._random = random.Random(number)  # noqa: S311
        self.keys: dict[str, Acknowledged] = {}
        self.changes = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        with SyncClient(self._profile) as client:
            while not self.stop.is_set():
                try:
                    self._life(client)
                except CipherfleetError:
                    time.sleep(0.02)

    def _life(self, client: SyncClient) -> None:
        key = client.create_key("AES-256-GCM", label=f"of {self._number}").id
        known = self.keys[key] = Acknowledged()
        self.changes += 1
        alias = f"a{self._number}-{len(self.keys)}"

        def encrypt() -> None:
            known.ciphertexts.append(client.encrypt(key, key.encode()))

        def rotate() -> None:
            known.version = client.rotate_key(key).version

        def name() -> None:
            client.set_alias(alias, key)
            known.alias = alias

        def tag() -> None:
            tags = {f"t{len(known.tags)}": str(self.changes)}
            client.update_key(key, tags=tags)
            known.tags |= tags

        for step in self._random.choices((encrypt, rotate, name, tag), k=6):
            step()
            self.changes += 1
        end = self._random.choice((client.disable_key, client.schedule_key_deletion, client.delete_key, None))
        if end is not None:
            known.state = ""
            known.state = end(key).state
            self.changes += 1


def check(client: SyncClient, key: str, known: Acknowledged) -> None:
    """That ``key`` is as it was acknowledged, or further."""
    now = client.describe_key(key)
    if known.state:
        assert now.state == known.state
    if now.state == "deleted":
        told = client.destruction_receipt(key)
        statement = signing.verify(told.receipt, DestructionStatement, (told.signer,))
        assert statement.key == key
        assert len(statement.material) >= known.version
        return
    assert now.version >= known.version
    assert known.tags.items() <= now.tags.items()
    assert not known.alias or known.alias in now.aliases
    if now.state == "enabled":
        for ciphertext in known.ciphertexts:
            assert client.decrypt(ciphertext) == key.encode()


@pytest.mark.slow
def test_every_acknowledged_change_outlives_the_kmc(own_cloud: TestCloud) -> None:
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile = consumer.sign_in()
    changers = [Changer(profile, number) for number in range(4)]
    for changer in changers:
        changer.thread.start()

    def changes() -> int:
        return sum(changer.changes for changer in changers)

    moments = random.Random(7)  # noqa: S311
    with SyncClient(profile) as client:
        for roles in KILLS:
            before = changes()
            eventually(lambda: changes() > before + 40, within=60.0, what="keys change")  # noqa: B023
            time.sleep(moments.random() / 10)  # anywhere between two changes
            own_cloud.kill(*roles)
            bring_back(own_cloud, consumer, client)
        for changer in changers:
            changer.stop.set()
        for changer in changers:
            changer.thread.join(60)
            assert not changer.thread.is_alive()
        keys = {key: known for changer in changers for key, known in changer.keys.items()}
        for key, known in keys.items():
            persistently(partial(check, client, key, known))
        assert len({known.state for known in keys.values()}) >= 4  # every kind of life was seen
        verdict = persistently(client.verify_audit)
        assert verdict.verified > len(keys)
    assert command("audit", "verify", "--state", own_cloud.cloud.state).status == 0
    print(f"{len(KILLS)} kills, {changes()} changes of {len(keys)} keys acknowledged, none lost")  # noqa: T201
