"""A consumer may have several Ukeys, and what they said of each other."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    ukeys = op.create_table(
        "ukeys",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("public_key", sa.BLOB(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("added_at", sa.Float(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("revoked_by", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "id"),
    )
    op.create_table(
        "ukey_statements",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("statement", sa.BLOB(), nullable=False),
        sa.ForeignKeyConstraint(["consumer"], ["consumers.name"]),
        sa.PrimaryKeyConstraint("consumer", "sequence"),
    )
    for name, key, at in op.get_bind().execute(sa.text("SELECT name, ukey, enrolled_at FROM consumers")).all():
        first = {"consumer": name, "id": f"ukey-{hashlib.sha256(key).hexdigest()[:8]}", "public_key": key, "added_at": at}
        op.bulk_insert(ukeys, [{**first, "state": "active", "label": "first", "revoked_by": ""}])
