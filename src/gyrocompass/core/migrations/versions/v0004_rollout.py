"""Rollouts: a policy with each version, which arm an event was of, and thumbs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("registered", sa.Column("policy_id", sa.String(), nullable=True))
    for name in ("rollout", "arm"):
        op.add_column("event", sa.Column(name, sa.String(), nullable=False, server_default=""))
    op.create_index("ix_event_rollout", "event", ["rollout"])
    op.create_table(
        "rollout",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), nullable=False, index=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("champion", sa.Integer(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("why", sa.String(), nullable=False),
        sa.Column("found", sa.JSON(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["name", "version"], ["registered.name", "registered.version"]),
    )
    op.create_table(
        "thumb",
        sa.Column("request_id", sa.String(), primary_key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("up", sa.Boolean(), nullable=False),
    )


def downgrade() -> None:
    for table in ("thumb", "rollout"):
        op.drop_table(table)
    op.drop_index("ix_event_rollout", "event")
    for name in ("rollout", "arm"):
        op.drop_column("event", name)
    op.drop_column("registered", "policy_id")
