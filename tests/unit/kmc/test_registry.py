"""The certificates in memory: what counts, whose it is, and that a look does not pass by what others hold."""

from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, Serial
from cipherfleet.kmc.registry import Issued, Registry

ALICE, BOB = ConsumerId("alice"), ConsumerId("bob")
SHOP = Identity(Role.APPLICATION, "shop", ALICE)


def issued(number: int, consumer: ConsumerId, id_: str = "shop", *, not_after: float = 100.0) -> Issued:
    return Issued(Serial(f"{number:x}"), Identity(Role.APPLICATION, id_, consumer), b"spki", not_after, b"pem")


def test_only_what_is_not_revoked_is_active_newest_first() -> None:
    registry = Registry()
    for number, end in ((1, 100.0), (2, 300.0), (3, 200.0)):
        registry.add(issued(number, ALICE, not_after=end))
    registry.add(issued(4, BOB))
    registry.revoke([Serial("2")])
    assert [i.serial for i in registry.active(SHOP)] == ["3", "1"]
    assert set(registry.serials(Role.APPLICATION, ALICE)) == {"1", "3"}
    assert registry.serials(Role.APPLICATION, ALICE, id_="other") == ()
    assert registry.serials(Role.VCM, ALICE) == ()
    assert registry.revoked_of(ALICE) == ("2",)


def test_what_was_revoked_before_it_was_known_is_never_active() -> None:
    registry = Registry()
    registry.revoke([Serial("1")])
    registry.add(issued(1, ALICE))
    assert registry.active(SHOP) == ()


def test_whose_certificates_they_are() -> None:
    registry = Registry()
    for number, consumer in ((1, ALICE), (2, BOB), (3, ALICE)):
        registry.add(issued(number, consumer))
    assert registry.by_consumer([Serial("3"), Serial("2"), Serial("1"), Serial("9")]) == {ALICE: ("1", "3"), BOB: ("2",)}


def test_the_expired_are_forgotten() -> None:
    registry = Registry()
    registry.add(issued(1, ALICE, not_after=0.0))
    registry.add(issued(2, ALICE, not_after=9000.0))
    registry.revoke([Serial("1")])
    registry.forget_expired(5000.0)
    assert registry.revoked_of(ALICE) == ()
    assert set(registry.serials(Role.APPLICATION, ALICE)) == {"2"}


def test_a_look_at_one_consumer_touches_nothing_of_another() -> None:
    registry = Registry()
    registry.add(issued(0, ALICE))
    registry.add(issued(1, BOB))
    del registry._active[Role.APPLICATION, BOB]
    registry._issued.clear()  # whoever went through all of them would find nothing now
    assert [i.serial for i in registry.active(SHOP)] == ["0"]
    assert registry.serials(Role.APPLICATION, ALICE) == ("0",)
