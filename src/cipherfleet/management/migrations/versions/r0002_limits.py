"""Limits of a vCC outlive it: a VCM keeps its own, and a consumer's next VCM begins with those set last."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("domains", sa.Column("limits", sa.Text(), nullable=True))
    op.add_column("vcms", sa.Column("limits", sa.Text(), nullable=True))
