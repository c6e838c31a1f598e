"""The first database of the KMC."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "sequence"),
    )
    op.create_table(
        "audit_heads",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("consumer"),
    )
    op.create_table(
        "authorities",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("certificate", sa.BLOB(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("spki_sha256", sa.BLOB(), nullable=False),
        sa.Column("not_after", sa.Float(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("certificate", sa.BLOB(), nullable=False),
        sa.PrimaryKeyConstraint("serial"),
    )
    op.create_index("certificates_identity", "certificates", ["role", "consumer", "id"], unique=False)
    op.create_table(
        "consumers",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("enrolled_at", sa.Float(), nullable=False),
        sa.Column("ukey", sa.BLOB(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("head", sa.BLOB(), nullable=False),
        sa.Column("row_bytes", sa.Integer(), nullable=False),
        sa.Column("statement_sequence", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "log",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("digest", sa.BLOB(), nullable=False),
        sa.ForeignKeyConstraint(
            ["consumer"],
            ["consumers.name"],
        ),
        sa.PrimaryKeyConstraint("consumer", "sequence"),
    )
    op.create_table(
        "rows",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("attributes", sa.BLOB(), nullable=False),
        sa.Column("wrapped", sa.BLOB(), nullable=False),
        sa.ForeignKeyConstraint(
            ["consumer"],
            ["consumers.name"],
        ),
        sa.PrimaryKeyConstraint("consumer", "key", "version"),
    )
    op.create_table(
        "statements",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("statement", sa.BLOB(), nullable=False),
        sa.Column("serial", sa.String(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["consumer"],
            ["consumers.name"],
        ),
        sa.PrimaryKeyConstraint("consumer", "name"),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("digest", sa.BLOB(), nullable=False),
        sa.Column("mark", sa.BLOB(), nullable=False),
        sa.ForeignKeyConstraint(
            ["consumer"],
            ["consumers.name"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "vcms",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("machine", sa.String(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("card", sa.String(), nullable=False),
        sa.Column("joined", sa.Boolean(), nullable=False),
        sa.Column("released", sa.Boolean(), nullable=False),
        sa.Column("loaded", sa.Boolean(), nullable=False),
        sa.Column("serving", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["consumer"],
            ["consumers.name"],
        ),
        sa.ForeignKeyConstraint(
            ["token"],
            ["tokens.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("token"),
    )
