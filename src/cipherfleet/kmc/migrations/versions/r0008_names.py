"""How many aliases and tags a consumer's keys have, counted as they come; what falls due has a term in the index."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("aliases", "tags"):
        op.add_column("consumers", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE consumers SET aliases = (SELECT count(*) FROM rows, json_each(CAST(rows.attributes AS TEXT), '$.aliases')"
        " WHERE rows.consumer = consumers.name AND rows.version = 0),"
        " tags = (SELECT count(*) FROM rows, json_each(CAST(rows.attributes AS TEXT), '$.tags')"
        " WHERE rows.consumer = consumers.name AND rows.version = 0)"
    )
    op.execute(
        "INSERT OR IGNORE INTO key_terms (consumer, term, key)"
        " WITH k AS (SELECT consumer, key, CAST(attributes AS TEXT) AS a FROM rows WHERE version = 0)"
        " SELECT consumer, 'due:', key FROM k WHERE json_extract(a, '$.state') = 'pending-deletion'"
        " OR (json_extract(a, '$.state') = 'enabled' AND (coalesce(json_extract(a, '$.terms.rotation_s'), 0) > 0"
        " OR coalesce(json_extract(a, '$.terms.rotation_uses'), 0) > 0))"
    )
