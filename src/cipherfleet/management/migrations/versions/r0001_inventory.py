"""The first inventory."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "machines",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("url", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_machines"),
    )
    op.create_table(
        "domains",
        sa.Column("consumer", sa.String(32), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", name="pk_domains"),
        sa.UniqueConstraint("index", name="uq_domains_index"),
    )
    op.create_table(
        "vcms",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("consumer", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("changed_at", sa.Float(53), nullable=False),
        sa.Column("machine", sa.String(16), nullable=True),
        sa.Column("token_id", sa.String(32), nullable=True),
        sa.Column("slot", sa.Integer(), nullable=True),
        sa.Column("created", sa.Boolean(), nullable=False),
        sa.Column("cause", sa.String(16), nullable=True),
        sa.Column("isolation", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_vcms"),
        sa.ForeignKeyConstraint(["consumer"], ["domains.consumer"], name="fk_vcms_consumer_domains"),
        sa.ForeignKeyConstraint(["machine"], ["machines.id"], name="fk_vcms_machine_machines"),
    )
    op.create_index("ix_vcms_consumer", "vcms", ["consumer"])
    op.create_index("ix_vcms_state", "vcms", ["state"])
    op.create_table(
        "tokens",
        sa.Column("vcm", sa.String(32), nullable=False),
        sa.Column("token_id", sa.String(32), nullable=False),
        sa.Column("token", sa.LargeBinary(64), nullable=False),
        sa.PrimaryKeyConstraint("vcm", name="pk_tokens"),
        sa.ForeignKeyConstraint(["vcm"], ["vcms.id"], name="fk_tokens_vcm_vcms"),
    )
    op.create_table(
        "ports",
        sa.Column("consumer", sa.String(32), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("vcm", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "slot", name="pk_ports"),
        sa.ForeignKeyConstraint(["consumer"], ["domains.consumer"], name="fk_ports_consumer_domains"),
        sa.ForeignKeyConstraint(["vcm"], ["vcms.id"], name="fk_ports_vcm_vcms"),
        sa.UniqueConstraint("vcm", name="uq_ports_vcm"),
    )
    op.create_table(
        "trace",
        sa.Column("vcm", sa.String(32), nullable=False),
        sa.Column("process", sa.String(8), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("actor", sa.String(16), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("ms", sa.Float(53), nullable=False),
        sa.Column("error", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("vcm", "process", "step", name="pk_trace"),
        sa.ForeignKeyConstraint(["vcm"], ["vcms.id"], name="fk_trace_vcm_vcms"),
    )
