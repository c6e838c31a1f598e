"""The inventory's tables. Nothing here or in the queries is particular to SQLite."""

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text, UniqueConstraint

FILE = "inventory.sqlite"
MIGRATIONS = "cipherfleet.management:migrations"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

machines = Table(
    "machines",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("url", String(255), nullable=False),
)

domains = Table(
    "domains",
    metadata,
    Column("consumer", String(32), primary_key=True),
    Column("index", Integer, nullable=False),
    Column("wanted", Boolean, nullable=False),
    Column("removed", Boolean, nullable=False),
    Column("limits", Text, nullable=True),
    UniqueConstraint("index"),
)

vcms = Table(
    "vcms",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("consumer", String(32), ForeignKey("domains.consumer"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("changed_at", Float(53), nullable=False),
    Column("machine", String(16), ForeignKey("machines.id"), nullable=True),
    Column("token_id", String(32), nullable=True),
    Column("slot", Integer, nullable=True),
    Column("created", Boolean, nullable=False),
    Column("cause", String(16), nullable=True),
    Column("isolation", Text, nullable=True),
    Column("error", Text, nullable=False),
    Column("limits", Text, nullable=True),
    Index("ix_vcms_consumer", "consumer"),
    Index("ix_vcms_state", "state"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("vcm", String(32), ForeignKey("vcms.id"), primary_key=True),
    Column("token_id", String(32), nullable=False),
    Column("token", LargeBinary(64), nullable=False),
)

ports = Table(
    "ports",
    metadata,
    Column("consumer", String(32), ForeignKey("domains.consumer"), primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("vcm", String(32), ForeignKey("vcms.id"), nullable=False),
    UniqueConstraint("vcm"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("event", Text, nullable=False),  # ManagementEvent, as JSON
)

outbox_state = Table(
    "outbox_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # there is one row: 1
    Column("outbox", String(32), nullable=False),
    Column("newest", Integer, nullable=False),
    Column("dropped", Integer, nullable=False),
)

trace = Table(
    "trace",
    metadata,
    Column("vcm", String(32), ForeignKey("vcms.id"), primary_key=True),
    Column("process", String(8), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("actor", String(16), nullable=False),
    Column("action", Text, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("ms", Float(53), nullable=False),
    Column("error", String(64), nullable=False),
)
