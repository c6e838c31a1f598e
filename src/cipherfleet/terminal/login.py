"""Creation step 8: the terminal logs in to its VCM, and the card behind it shows that it holds the Ukey's share."""

import asyncio
import os

from cipherfleet.channel.client import Caller
from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import CardUnconfirmed, ServiceUnavailable, TimedOut
from cipherfleet.contract.ids import CardId, VcmId
from cipherfleet.contract.statements import LoginStatement
from cipherfleet.contract.vcm_api import LoginReply
from cipherfleet.terminal.ukey import Ukey

POLL_S = 0.05
NONCE_BYTES = 32


async def log_in(ukey: Ukey, caller: Caller, vcm: VcmId, *, patience: float) -> CardId:
    """Ask until the VCM serves, at most ``patience`` seconds; the card that confirmed.

    Raises ``CardUnconfirmed``, ``LoginRefused``, a certificate error, ``UkeyAbsent``, or ``TimedOut`` naming the last obstacle.
    """
    obstacle = "it did not answer"
    try:
        async with asyncio.timeout(patience):
            while True:
                nonce = os.urandom(NONCE_BYTES)
                statement = await sign(LoginStatement(ukey.record.consumer, vcm, nonce), ukey.signer)
                try:
                    reply = await caller.call("POST", "/v1/login", statement, reply=LoginReply)
                except ServiceUnavailable as exc:
                    obstacle = exc.message
                    await asyncio.sleep(POLL_S)
                    continue
                if reply.vcm != vcm:
                    raise CardUnconfirmed(f"{reply.vcm} answered the login to {vcm}")
                await ukey.share.check_confirmation(reply.card, vcm, nonce, reply.confirmation)
                return reply.card
    except TimeoutError as exc:
        raise TimedOut(f"{vcm} offered no service within {patience:.0f} s: {obstacle}") from exc
