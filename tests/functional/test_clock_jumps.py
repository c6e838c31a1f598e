"""The wall clock was set back: certificates of the platform that are not valid yet are made anew by ``up``."""

import asyncio
from datetime import UTC, datetime, timedelta

from cipherfleet.channel.certificates import Credentials
from cipherfleet.contract.identities import Identity, Role
from tests.pki import Authority
from tests.support import TestCloud


def from_the_future(cloud: TestCloud, identity: Identity) -> Credentials:
    """What a process of this cloud finds in its folder, valid from in an hour, for as long as a new one."""
    life = timedelta(days=cloud.settings.process_certificate_days)
    made = Authority("platform").credentials(identity, lifetime=life, not_before=datetime.now(UTC) + timedelta(hours=1))
    made.save(cloud.cloud.state / "credentials" / identity.id)
    return made


def test_a_processs_certificate_from_the_future_is_not_used(shared_cloud: TestCloud) -> None:
    future = from_the_future(shared_cloud, Identity(Role.MACHINE, "m99"))
    renewed, kept = (asyncio.run(shared_cloud.cloud._certify(Role.MACHINE, "m99", "127.0.0.1")) for _ in range(2))
    assert renewed != future
    assert renewed.left() > 0
    assert kept == renewed


def test_an_operators_certificate_from_the_future_is_made_anew(own_cloud: TestCloud) -> None:
    from_the_future(own_cloud, Identity(Role.OPERATOR, "operator"))
    own_cloud.up()
    assert len(own_cloud.platform().machines) == own_cloud.machines
