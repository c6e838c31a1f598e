"""What is encrypted at the limit of its size can be decrypted again."""

import pytest

from cipherfleet.contract.errors import TooLarge
from cipherfleet.contract.vcc import MAX_DATA_BYTES, StreamRequest, Verb
from tests.unit.computing.card.consumer import Function


@pytest.mark.parametrize(
    ("name", "most"), [("AES-256-GCM", MAX_DATA_BYTES), ("AES-256-KW", 65536), ("HPKE-ML-KEM-768-X25519", MAX_DATA_BYTES)]
)
def test_the_longest_plaintext_comes_back(name: str, most: int) -> None:
    function = Function()
    size = {"AES-256-GCM": 32, "AES-256-KW": 32}.get(name, 96)
    handle = function.load(name, bytes(range(size)), bare=True)
    longest = function.run(StreamRequest(Verb.ENCRYPT), bytes(most), handle=handle)
    assert len(longest) > most
    assert function.run(StreamRequest(Verb.DECRYPT), longest, handle=handle) == bytes(most)
    with pytest.raises(TooLarge):
        function.run(StreamRequest(Verb.ENCRYPT), bytes(most + 8), handle=handle)
