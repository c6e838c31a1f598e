"""How many keys and rows a consumer has, counted as they come; and an index of keys by label, state, algorithm and terms."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("keys", "row_count"):
        op.add_column("consumers", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE consumers SET keys = (SELECT count(*) FROM rows WHERE rows.consumer = consumers.name AND version = 0)")
    op.execute("UPDATE consumers SET row_count = (SELECT count(*) FROM rows WHERE rows.consumer = consumers.name)")
    op.create_table(
        "key_index",
        sa.Column("consumer", sa.String(), sa.ForeignKey("consumers.name"), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("algorithm", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
    )
    op.create_index("key_index_position", "key_index", ["consumer", "position"])
    for name in ("algorithm", "state", "label"):
        op.create_index(f"key_index_{name}", "key_index", ["consumer", name, "position"])
    op.create_table(
        "key_terms",
        sa.Column("consumer", sa.String(), sa.ForeignKey("consumers.name"), primary_key=True),
        sa.Column("term", sa.String(), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
    )
    op.create_index("key_terms_key", "key_terms", ["consumer", "key"])
    op.execute(
        "INSERT INTO key_index (consumer, key, position, algorithm, state, label)"
        " SELECT r.consumer, r.key, min(l.sequence), json_extract(CAST(r.attributes AS TEXT), '$.algorithm'),"
        " json_extract(CAST(r.attributes AS TEXT), '$.state'), coalesce(json_extract(CAST(r.attributes AS TEXT), '$.label'), '')"
        " FROM rows r JOIN log l ON l.consumer = r.consumer AND l.subject = 'key/' || r.key || '/0'"
        " WHERE r.version = 0 GROUP BY r.consumer, r.key"
    )
