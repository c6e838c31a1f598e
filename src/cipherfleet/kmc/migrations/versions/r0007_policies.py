"""The newest policy that a consumer's Ukeys signed."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "policies",
        sa.Column("consumer", sa.String(), nullable=False),
        sa.Column("statement", sa.BLOB(), nullable=False),
        sa.ForeignKeyConstraint(["consumer"], ["consumers.name"]),
        sa.PrimaryKeyConstraint("consumer"),
    )
