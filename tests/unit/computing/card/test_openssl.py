"""That no algorithm is left out of those that the ``openssl`` program is tried with, and that what it is said not to do it does not do."""

from fnmatch import fnmatch

import pytest

from cipherfleet.contract.algorithms import REGISTRY, Algorithm, Kind
from tests.unit.computing.card import test_openssl_public, test_openssl_secret  # noqa: F401 - they tell EXERCISED
from tests.unit.computing.card.openssl_program import CANNOT, EXERCISED, Openssl


def left_out(chosen: Algorithm) -> list[str]:
    return [pattern for pattern in CANNOT if fnmatch(chosen.name, pattern)]


def test_each_algorithm_meets_openssl_or_there_is_a_reason() -> None:
    reasoned = {a.name for a in REGISTRY.values() if left_out(a)}
    assert reasoned | EXERCISED == set(REGISTRY)
    assert not reasoned & EXERCISED
    assert {pattern for a in REGISTRY.values() for pattern in left_out(a)} == set(CANNOT)


@pytest.mark.parametrize(
    "chosen", [a for a in REGISTRY.values() if left_out(a) and a.kind in (Kind.AEAD, Kind.CIPHER)], ids=lambda a: a.name
)
def test_openssl_enc_refuses_what_it_is_said_to(chosen: Algorithm, tmp_path_factory: pytest.TempPathFactory) -> None:
    openssl = Openssl(tmp_path_factory.getbasetemp())
    said = openssl.refuses("enc", f"-{chosen.name.lower()}", "-K", "00" * (chosen.key_bits // 8), "-iv", "00" * 16, given=b"x" * 16)
    assert any(reason in said for reason in ("ciphers not supported", "Unknown cipher", "nknown option"))


def test_openssl_cms_refuses_modes_but_gcm(tmp_path_factory: pytest.TempPathFactory) -> None:
    openssl = Openssl(tmp_path_factory.getbasetemp())
    for cipher in ("aes-128-ccm", "aes-128-gcm-siv", "sm4-gcm"):
        openssl.refuses("cms", "-encrypt", "-binary", f"-{cipher}", "-secretkey", "00" * 16, "-secretkeyid", "01", given=b"data")
