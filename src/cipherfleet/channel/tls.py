"""TLS contexts: mutual always, no session tickets, 1.3 among ourselves, 1.2 with AEAD for consumers' applications."""

import os
import ssl

from cipherfleet.channel.certificates import Credentials


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    """``ssl`` reads keys from files only, so this one is a file without a name or place: a memfd."""
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, credentials.key + credentials.chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _context(protocol: int, credentials: Credentials, minimum: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = minimum
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.load_verify_locations(cadata=credentials.trust.decode())
    _load(context, credentials)
    return context


def server_context(credentials: Credentials, *, minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A server that accepts clients of ``credentials.trust`` alone: foreign ones fail in the handshake."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials, minimum)
    context.num_tickets = 0
    return context


def client_context(credentials: Credentials, *, minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that demands the server's name (give ``server_hostname``) and shows its own certificate."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, credentials, minimum)


def renew(context: ssl.SSLContext, credentials: Credentials) -> None:
    """New handshakes of ``context`` use the new certificate; open connections go on."""
    _load(context, credentials)
