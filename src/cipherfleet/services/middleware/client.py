"""The Python client of a consumer's VCMs."""

from typing import Self

from cipherfleet.channel.audit_check import AuditCheck, AuditVerdict
from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.audit import MAX_PAGE, AuditEntry, AuditLog, AuditQuery
from cipherfleet.contract.errors import CertificateInvalid
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.vcm_api import (
    EndpointsReply,
)
from cipherfleet.services import wire
from cipherfleet.services.middleware.calls import FilePath
from cipherfleet.services.middleware.client_data import DataCalls
from cipherfleet.services.middleware.client_keys import KeyCalls
from cipherfleet.services.middleware.connection import read_profile

TIMEOUT_S = 60.0


class Client(KeyCalls, DataCalls):
    """Cryptography of one consumer, through whichever of its VCMs serves.

    ``profile``: what ``cipherfleet app add`` wrote, or its path. ``timeout``: seconds without any progress until ``TimedOut``.

    A *source* is bytes, a binary file, or an iterable (or asynchronous iterable) of bytes; it is read while it is sent, with
    bounded memory. Every method raises ``CipherfleetError``: ``ServiceOff`` when no VCM serves, ``NotPermitted`` when the
    application lacks the right, ``KeyUnknown``, ``KeyDisabled``, ``WrongKeyType`` and so on. An answer that breaks off
    raises, it never just ends.
    """

    def __init__(self, profile: Profile | FilePath, *, timeout: float = TIMEOUT_S) -> None:
        super().__init__(read_profile(profile), timeout)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Load key and certificate; a VCM is looked for with the first call. Raises ``CertificateInvalid``."""
        await self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    # -- the service ---------------------------------------------------------------------------------------------------

    async def algorithms(self) -> tuple[Algorithm, ...]:
        """All that there are, also what the consumer's policy refuses: ``policy`` tells that."""
        return (await self._connection.ask("GET", "/v1/algorithms", wire.AlgorithmsReply)).algorithms

    async def policy(self) -> tuple[str, dict[str, str]]:
        """The name of the consumer's policy, and the algorithms that it refuses for new data, each with the rule."""
        reply = await self._connection.ask("GET", "/v1/algorithms", wire.AlgorithmsReply)
        return reply.policy, reply.refused

    async def audit(
        self, *, after: int = 0, since: float = 0.0, event: str = "", key: str = "", newest: bool = False, limit: int = MAX_PAGE
    ) -> tuple[AuditEntry, ...]:
        """Entries of the consumer's audit log, oldest first, at most ``limit`` (up to 2,000): ask on with ``after``, the last one's number.

        ``since``: unix seconds. ``newest``: the last ones that fit, not the first.
        """
        return (await self.audit_page(AuditQuery("", after, since, event, key, newest, limit))).entries

    async def audit_page(self, query: AuditQuery) -> AuditLog:
        """A page as the VCM hands it on; without filters with the checkpoints."""
        return await self._connection.ask("GET", query.path, AuditLog)

    async def verify_audit(self) -> AuditVerdict:
        """Check the consumer's whole audit log here, by the signing key that the Ukey put into the profile.

        Raises ``AuditBroken``, or ``CertificateInvalid`` for a profile without that key.
        """
        if not self.profile.kmc_signing_key:
            raise CertificateInvalid("the profile names no signing key of the KMC", "sign the application in again: cipherfleet app add")
        check = AuditCheck(self.profile.consumer, self.profile.kmc_signing_key)
        query: AuditQuery | None = AuditQuery()
        while query is not None:
            query = check.page(await self.audit_page(query))
        return check.end()

    async def endpoints(self) -> tuple[str, ...]:
        """Where this consumer's VCMs are now; the client uses them from here on."""
        told = (await self._connection.ask("GET", "/v1/endpoints", EndpointsReply)).endpoints
        self._connection.endpoints.learn(told)
        return told

    async def health(self) -> wire.HealthReply:
        """Which VCM and card answer. Raises ``ServiceOff``."""
        return await self._connection.ask("GET", "/v1/health", wire.HealthReply)
