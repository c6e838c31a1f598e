"""The KMC as the management platform sees it: identities, tokens and authorisations, never a key."""

from cipherfleet.channel.client import Caller
from cipherfleet.contract.audit import ManagementEvents
from cipherfleet.contract.ids import ConsumerId, TokenId, VcmId
from cipherfleet.contract.kmc_api import Challenge, ChallengeRequest, IdentityReply, VcmAuthorisation, VcmKmcState
from cipherfleet.contract.statements import Signed


class Authority:
    """The management platform's conversation with CA module and key escrow. Raises ``KmcUnavailable`` or what the KMC says."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def challenge(self, consumer: ConsumerId) -> Challenge:
        return await self._caller.call("POST", "/v1/identity/challenges", ChallengeRequest(consumer), reply=Challenge)

    async def verify(self, request: Signed) -> IdentityReply:
        """Flow step b."""
        return await self._caller.call("POST", "/v1/identity/verify", request, reply=IdentityReply)

    async def authorise(self, vcm: VcmId, authorisation: VcmAuthorisation) -> None:
        await self._caller.call("PUT", f"/v1/vcms/{vcm}", authorisation)

    async def revoke_vcm(self, vcm: VcmId) -> None:
        """Idempotent: token, certificate and leases of a VCM."""
        await self._caller.call("DELETE", f"/v1/vcms/{vcm}")

    async def revoke_token(self, token: TokenId) -> None:
        """Idempotent."""
        await self._caller.call("DELETE", f"/v1/tokens/{token}")

    async def state(self, vcm: VcmId) -> VcmKmcState:
        return await self._caller.call("GET", f"/v1/vcms/{vcm}", reply=VcmKmcState)

    async def report(self, events: ManagementEvents) -> None:
        """Idempotent: what was decided, for the audit log."""
        await self._caller.call("POST", "/v1/audit/events", events)

    async def close(self) -> None:
        await self._caller.close()
