"""The KMC's tables. What is wrapped stands here wrapped; no share, no ciphertext CMK and no token ever does."""

from sqlalchemy import BLOB, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table

FILE = "kmc.sqlite"
MIGRATIONS = "cipherfleet.kmc:migrations"

metadata = MetaData()

authorities = Table(
    "authorities",
    metadata,
    Column("name", String, primary_key=True),  # root, platform, domain/CONSUMER: also the key's label in the HSM
    Column("certificate", BLOB, nullable=False),  # PEM
)

consumers = Table(
    "consumers",
    metadata,
    Column("name", String, primary_key=True),
    Column("state", String, nullable=False),  # pending | enrolled | revoked
    Column("enrolled_at", Float, nullable=False),
    Column("ukey", BLOB, nullable=False),  # SubjectPublicKeyInfo of the first Ukey
    Column("epoch", Integer, nullable=False),
    Column("sequence", Integer, nullable=False),  # of the escrow's log
    Column("head", BLOB, nullable=False),
    Column("row_bytes", Integer, nullable=False),
    Column("keys", Integer, nullable=False, server_default="0"),
    Column("row_count", Integer, nullable=False, server_default="0"),
    Column("aliases", Integer, nullable=False, server_default="0"),
    Column("tags", Integer, nullable=False, server_default="0"),
    Column("statement_sequence", Integer, nullable=False),  # the newest application statement's
)

ukeys = Table(
    "ukeys",
    metadata,
    Column("consumer", String, primary_key=True),
    Column("id", String, primary_key=True),
    Column("public_key", BLOB, nullable=False),  # SubjectPublicKeyInfo of its identity key
    Column("state", String, nullable=False),  # active | revoked
    Column("added_at", Float, nullable=False),
    Column("label", String, nullable=False),
    Column("revoked_by", String, nullable=False),  # consumer | operator, or empty
)

ukey_statements = Table(
    "ukey_statements",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("statement", BLOB, nullable=False),  # Signed, as JSON
)

policies = Table(
    "policies",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("statement", BLOB, nullable=False),  # Signed, as JSON: the newest one
)

epochs = Table(
    "epochs",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("statement", BLOB, nullable=False),  # Signed, as JSON
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String, primary_key=True),
    Column("role", String, nullable=False),
    Column("consumer", String, nullable=False),
    Column("id", String, nullable=False),
    Column("spki_sha256", BLOB, nullable=False),
    Column("not_after", Float, nullable=False),
    Column("status", String, nullable=False),  # active | revoked
    Column("certificate", BLOB, nullable=False),  # PEM, leaf alone
    Index("certificates_identity", "role", "consumer", "id"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String, primary_key=True),
    Column("consumer", String, ForeignKey("consumers.name"), nullable=False),
    Column("digest", BLOB, nullable=False),  # SHA-256 of the token
    Column("mark", BLOB, nullable=False),
)

vcms = Table(
    "vcms",
    metadata,
    Column("id", String, primary_key=True),
    Column("consumer", String, ForeignKey("consumers.name"), nullable=False),
    Column("machine", String, nullable=False),
    Column("token", String, ForeignKey("tokens.id"), nullable=False, unique=True),
    Column("address", String, nullable=False),
    Column("card", String, nullable=False),  # empty until the VCM was certified
    Column("joined", Boolean, nullable=False),  # the VCM came with its certificate: its token is used up
    Column("released", Boolean, nullable=False),  # the terminal released the CMK to its card
    Column("loaded", Boolean, nullable=False),  # the card has combined both shares
    Column("serving", Boolean, nullable=False),
)

rows = Table(
    "rows",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("key", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("attributes", BLOB, nullable=False),
    Column("wrapped", BLOB, nullable=False),
)

key_index = Table(
    "key_index",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("key", String, primary_key=True),
    Column("position", Integer, nullable=False),  # of the log: which change brought it
    Column("algorithm", String, nullable=False),
    Column("state", String, nullable=False),
    Column("label", String, nullable=False),
    Index("key_index_position", "consumer", "position"),
    Index("key_index_algorithm", "consumer", "algorithm", "position"),
    Index("key_index_state", "consumer", "state", "position"),
    Index("key_index_label", "consumer", "label", "position"),
)

key_terms = Table(
    "key_terms",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("term", String, primary_key=True),  # KIND:VALUE, see contract.key_life.terms_of
    Column("key", String, primary_key=True),
    Index("key_terms_key", "consumer", "key"),
)

log = Table(
    "log",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("subject", String, nullable=False),
    Column("digest", BLOB, nullable=False),
)

statements = Table(
    "statements",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("name", String, primary_key=True),
    Column("statement", BLOB, nullable=False),  # Signed, as JSON
    Column("serial", String, nullable=False),  # of the certificate that was issued last
    Column("revoked", Boolean, nullable=False),  # by the consumer's statement or by the operator
)

delegations = Table(
    "delegations",
    metadata,
    Column("consumer", String, ForeignKey("consumers.name"), primary_key=True),
    Column("delegator", String, primary_key=True),
    Column("delegate", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("sequence", Integer, nullable=False),  # the delegator's own number
    Column("statement", BLOB, nullable=False),  # Signed, as JSON
)

audit = Table(
    "audit",
    metadata,
    Column("consumer", String, primary_key=True),  # empty: the platform's own lines
    Column("sequence", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("actor", String, nullable=False),
    Column("event", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("count", Integer, nullable=False),
    Index("audit_at", "at"),
    Index("audit_subject", "consumer", "subject"),
)

audit_heads = Table(
    "audit_heads",
    metadata,
    Column("consumer", String, primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("digest", String, nullable=False),
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("consumer", String, primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("statement", BLOB, nullable=False),  # Signed[AuditCheckpointStatement], as JSON
)

management_outbox = Table(
    "management_outbox",
    metadata,
    Column("id", Integer, primary_key=True),  # there is one row: 1
    Column("outbox", String, nullable=False),
    Column("number", Integer, nullable=False),  # of the newest event that was written
)

key_usage = Table(
    "key_usage",
    metadata,
    Column("consumer", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("uses", Integer, nullable=False),
    Column("last_used_at", Float, nullable=False),
)

usage_reports = Table(
    "usage_reports",
    metadata,
    Column("vcm", String, primary_key=True),
    Column("number", Integer, nullable=False),  # of the newest report that was written
)
