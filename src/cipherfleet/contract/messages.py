"""What every conversation between processes is made of.

Each server's routes and messages stand in a module of its own: ``kmc_api``, ``management_api``, ``machine_api``,
``vcm_api``. Bodies are JSON (bytes as base64); unknown fields are ignored, so that a newer peer may say more.
"""

import msgspec


class Message(msgspec.Struct, frozen=True, omit_defaults=False):
    """Base of all messages."""


class Done(Message, frozen=True):
    """The reply when there is nothing to say."""


class Chain(Message, frozen=True):
    """A certificate and its intermediates, PEM, leaf first; ``trust`` is what the owner shall trust, PEM."""

    chain: bytes
    trust: bytes


class CertificateRequest(Message, frozen=True):
    """``csr``: PKCS#10, DER. ``addresses``: IP addresses for the certificate."""

    csr: bytes
    addresses: tuple[str, ...] = ()
