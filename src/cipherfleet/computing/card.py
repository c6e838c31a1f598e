"""The crypto card: transport keys made at its start, and one virtual function for each attached vCC.

Its keys live in memory alone; a card that starts again is a new card with a new id.
"""

from collections.abc import Callable, Iterable

from cipherfleet.channel.certificates import check_chain, identity_of, make_request, public_key_der
from cipherfleet.computing.card_chain import Deliveries
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_lease import boottime
from cipherfleet.computing.engine_wrap import TransportKeys
from cipherfleet.contract.errors import CertificateInvalid, Exists
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId, new_card_id
from cipherfleet.contract.kmc_api import CardReply


class Card:
    """One card. ``clock`` gives seconds and never goes back (``CLOCK_BOOTTIME``)."""

    def __init__(self, machine: MachineId, clock: Callable[[], float] = boottime) -> None:
        self.id = new_card_id(machine)
        self.clock = clock
        self.transport = TransportKeys()
        self.operations_before = self.bytes_before = 0  # of functions that are gone
        self._certified: CardReply | None = None
        self._functions: dict[VcmId, VirtualFunction] = {}
        self._deliveries = Deliveries()

    @property
    def csr(self) -> bytes:
        """A PKCS#10 request over the RSA transport key, DER."""
        return make_request(self.transport.rsa, Identity(Role.CARD, self.id))

    def certify(self, reply: CardReply) -> None:
        """Take the certificate, and the key that countersigns leases: once.

        Raises ``CertificateInvalid``, ``CertificateExpired``, or ``Exists`` when another key was given before.
        """
        leaf = check_chain(reply.chain.chain, reply.chain.trust)
        if identity_of(leaf) != Identity(Role.CARD, self.id) or public_key_der(leaf.public_key()) != self.transport.rsa_public_key:
            raise CertificateInvalid("the certificate is for another card")
        if self._certified is not None and self._certified.kmc_signing_key != reply.kmc_signing_key:
            raise Exists("this card is certified by another KMC")
        self._certified = reply

    @property
    def functions(self) -> Iterable[VirtualFunction]:
        return self._functions.values()

    @property
    def operations(self) -> int:
        """Operations since the card's start, of all vCCs."""
        return self.operations_before + sum(f.operations for f in self.functions)

    @property
    def bytes(self) -> int:
        """Bytes of data taken in since the card's start."""
        return self.bytes_before + sum(f.bytes for f in self.functions)

    def attach(self, vcm: VcmId, consumer: ConsumerId) -> VirtualFunction:
        """A new virtual function. Raises ``Exists``."""
        if vcm in self._functions:
            raise Exists(f"{vcm} has a vCC of this card already")
        function = VirtualFunction(self.id, vcm, consumer, self.transport, lambda: self._certified, self.clock, self._deliveries)
        self._functions[vcm] = function
        return function

    def detach(self, function: VirtualFunction) -> None:
        """Zeroise all that a virtual function holds. Detaching what is gone succeeds."""
        function.drop()
        if self._functions.get(function.vcm) is function:
            del self._functions[function.vcm]
            self.operations_before += function.operations
            self.bytes_before += function.bytes
