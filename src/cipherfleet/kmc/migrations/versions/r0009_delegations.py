"""What applications have delegated to others."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "delegations",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("delegator", sa.String(), nullable=False),
        sa.Column("delegate", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("statement", sa.BLOB(), nullable=False),
        sa.ForeignKeyConstraint(["consumer"], ["consumers.name"]),
        sa.PrimaryKeyConstraint("consumer", "delegator", "delegate", "key"),
    )
