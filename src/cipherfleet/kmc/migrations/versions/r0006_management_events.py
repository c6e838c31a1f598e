"""The KMC remembers up to where it has written what the management platform decided."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "management_outbox",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("outbox", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
