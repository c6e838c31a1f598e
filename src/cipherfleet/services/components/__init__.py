"""The network components of a VCM: its cryptography over HTTP and mutual TLS. Raw bytes in bodies, JSON for the rest.

::

    POST /v1/keys                      KeyCreateRequest -> KeyDescription               create
    POST /v1/keys/batch                KeysCreateRequest -> KeyListReply, all or none   create
    GET  /v1/import                    -> ImportTarget                                  create
    POST /v1/import                    KeyImportRequest -> KeyDescription               create
    POST /v1/import/batch              KeysImportRequest -> KeyListReply, all or none   create
    GET  /v1/keys                      -> KeyListReply (?limit=&after=&label=&state=&algorithm=&tag=)  show
    GET  /v1/keys/{key}                -> KeyDescription                                show
    POST /v1/keys/{key}/rotate, enable, disable  -> KeyDescription                      manage
    POST /v1/keys/{key}/update         KeyUpdate -> KeyDescription                      manage
    POST /v1/import/parameters         ImportParametersRequest -> ImportParameters      create
    POST /v1/import/wrapped            WrappedImportRequest -> KeyDescription           create
    POST /v1/keys/{key}/export         ExportAsk -> ExportReply                         manage
    POST /v1/keys/{key}/trim           TrimRequest -> KeyDescription                    manage
    POST /v1/keys/{key}/schedule-deletion  DeletionRequest -> KeyDescription            manage
    POST /v1/keys/{key}/derive-key     KeyDeriveRequest -> KeyDescription               derive and create
    GET  /v1/keys/{key}/receipt        -> ReceiptReply: the HSM's, of what was destroyed  show
    POST /v1/keys/{key}/cancel-deletion, delete (at once)  -> KeyDescription            manage
    POST /v1/keys/{key}/delegate       Signed[DelegationStatement] -> Delegation        a grant to delegate
    GET  /v1/keys/{key}/delegations    -> DelegationsReply: given and got, or all       any, show
    GET  /v1/aliases                   -> AliasListReply                                show
    PUT  /v1/aliases/{alias}           AliasRequest -> KeyDescription                   manage
    DELETE /v1/aliases/{alias}         -> Done                                          manage
    POST /v1/keys/{key}/encrypt        plaintext -> ciphertext                          encrypt
    POST /v1/decrypt                   ciphertext -> plaintext                          decrypt
    POST /v1/keys/{key}/decrypt        ciphertext, bare or a message -> plaintext       decrypt
    POST /v1/keys/{key}/reencrypt      ciphertext of any key -> ciphertext              decrypt and encrypt
    POST /v1/keys/{key}/data-key       DataKeyAsk -> DataKeyReply                       encrypt
    POST /v1/keys/{key}/sign, mac      message -> signature, MAC                        sign, mac
    POST /v1/keys/{key}/verify, verify-mac   message -> 204, or 422                     verify
    POST /v1/keys/{key}/agree, derive  AgreeAsk, DeriveAsk -> SecretReply               derive
    POST /v1/keys/{key}/encapsulate    -> EncapsulationReply                            encrypt
    POST /v1/keys/{key}/decapsulate    DecapsulateAsk -> SecretReply                    decrypt
    POST /v1/batch                     BatchAsk -> BatchReply                           each item's own
    POST /v1/digest/{algorithm}?length=N   message -> digest                            digest
    GET  /v1/random?bytes=N            -> 1 to 1048576 bytes                            random
    GET  /v1/audit?after=&since=&event=&key=&newest=&limit=   -> AuditLog               show
    GET  /v1/endpoints, algorithms, health, requests/{request}/error                    any
    POST /v1/login                     Signed[LoginStatement] -> LoginReply             (the terminal)

The last column is the right that a Ukey-signed statement must grant. A key is named by its id or as ``alias/NAME``
(``alias%2FNAME`` in a path). Decrypting, ``X-Cipherfleet-Key`` may name the key that the
ciphertext must have been made with. Headers (base64): ``X-Cipherfleet-Context``,
``X-Cipherfleet-Target-Context`` (at most 4 KiB), ``X-Cipherfleet-Signature``; ``X-Cipherfleet-Digest`` chooses a digest,
``X-Cipherfleet-Prehashed: true`` says that the message is one. What a bare key encrypts (see ``contract.vcc.StreamRequest``) names no key:
the path does, and ``X-Cipherfleet-Key-Version`` the version, if it is not the newest. Bodies of any size stream both ways at once.
An error after the answer has begun closes the connection before the answer's end; the caller that named its request in
``X-Cipherfleet-Request`` may ask why.
"""

from cipherfleet.channel.server import Server
from cipherfleet.contract.identities import Role
from cipherfleet.contract.vcm import VcmHost
from cipherfleet.services.components.agreements import Agreements
from cipherfleet.services.components.batches import Batches
from cipherfleet.services.components.ciphers import Ciphers
from cipherfleet.services.components.delegations import Delegations
from cipherfleet.services.components.keys import Keys
from cipherfleet.services.components.life import Life
from cipherfleet.services.components.routes import Routes
from cipherfleet.services.components.service import Service
from cipherfleet.services.components.signatures import Signatures
from cipherfleet.services.components.transfers import Transfers

STALL_S = 30.0


def mount(server: Server, host: VcmHost, *, stall_s: float = STALL_S) -> None:
    """Add all routes to ``server``. A peer that neither sends nor takes anything for ``stall_s`` seconds is given up."""
    routes = Routes(server, host, stall_s)
    Keys(routes)
    Life(routes)
    Delegations(routes)
    Transfers(routes)
    Ciphers(routes)
    Signatures(routes)
    Agreements(routes)
    Batches(routes)
    server.route("POST", "/v1/login", {Role.TERMINAL}, Service(routes).login)


__all__ = ["STALL_S", "mount"]
