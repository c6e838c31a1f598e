"""The audit log gets counts, checkpoints and an encoding of its own; keys get their last use."""

import hashlib
import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("count", sa.Integer(), nullable=False, server_default="1"))
    op.create_index("audit_at", "audit", ["at"])
    op.create_index("audit_subject", "audit", ["consumer", "subject"])
    op.create_table(
        "audit_checkpoints",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("statement", sa.BLOB(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "sequence"),
    )
    op.create_table(
        "key_usage",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("last_used_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "key"),
    )
    op.create_table(
        "usage_reports",
        sa.Column("vcm", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("vcm"),
    )
    _chain_anew(op.get_bind())


def _chain_anew(connection: sa.Connection) -> None:
    """Entries from before counts were part of the encoding are chained as they stand."""
    heads: dict[str, tuple[int, str]] = {}
    rows = connection.execute(
        sa.text("SELECT consumer, sequence, at, actor, event, subject, outcome FROM audit ORDER BY consumer, sequence")
    ).all()
    for row in rows:
        text = "cipherfleet audit v2"
        previous = heads[row.consumer][1] if row.consumer in heads else hashlib.sha256(f"{text} {row.consumer}".encode()).hexdigest()
        content = [text, row.sequence, row.at, row.consumer, row.actor, row.event, row.subject, row.outcome, 1]
        encoded = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        digest = hashlib.sha256(bytes.fromhex(previous) + encoded).hexdigest()
        heads[row.consumer] = (row.sequence, digest)
        where = {"digest": digest, "consumer": row.consumer, "sequence": row.sequence}
        connection.execute(sa.text("UPDATE audit SET digest = :digest WHERE consumer = :consumer AND sequence = :sequence"), where)
    for consumer, (_, digest) in heads.items():
        connection.execute(
            sa.text("UPDATE audit_heads SET digest = :digest WHERE consumer = :consumer"), {"digest": digest, "consumer": consumer}
        )
