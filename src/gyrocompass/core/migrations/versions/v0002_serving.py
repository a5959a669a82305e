"""What a server keeps: events, reviews and verdicts, API keys, acts of administrators."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "event",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("request_id", sa.String(), nullable=False, index=True),
        sa.Column("at", sa.Double(), nullable=False, index=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("slice", sa.String(), nullable=False),
        sa.Column("tier", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("prompt_characters", sa.Integer(), nullable=False),
        sa.Column("sequence_logprob", sa.Double(), nullable=True),
        sa.Column("mean_logprob", sa.Double(), nullable=True),
        sa.Column("min_logprob", sa.Double(), nullable=True),
        sa.Column("mean_entropy", sa.Double(), nullable=True),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("calibrator", sa.String(), nullable=False),
        sa.Column("policy", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("review_id", sa.String(), nullable=True),
        sa.Column("inclusion", sa.Double(), nullable=True),
        sa.Column("queued_s", sa.Double(), nullable=False),
        sa.Column("first_token_s", sa.Double(), nullable=False),
        sa.Column("total_s", sa.Double(), nullable=False),
        sa.Column("consent", sa.Boolean(), nullable=False),
        sa.Column("prompt", sa.String(), nullable=True),
        sa.Column("text", sa.String(), nullable=True),
    )
    op.create_table(
        "review",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("request_id", sa.String(), nullable=False, index=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("state", sa.String(), nullable=False, index=True),
        sa.Column("urgent", sa.Boolean(), nullable=False),
        sa.Column("inclusion", sa.Double(), nullable=False),
        sa.Column("prompt", sa.String(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("tokens", sa.JSON(), nullable=False),
        sa.Column("candidates", sa.JSON(), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("calibrator", sa.String(), nullable=False),
        sa.Column("policy", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("slice", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("consent", sa.Boolean(), nullable=False),
        sa.Column("needs", sa.Integer(), nullable=False),
        sa.Column("claimed_by", sa.String(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("webhook", sa.String(), nullable=True),
        sa.Column("webhook_due", sa.Double(), nullable=True),
        sa.Column("webhook_tries", sa.Integer(), nullable=False),
    )
    op.create_table(
        "verdict",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("review_id", sa.String(), sa.ForeignKey("review.id"), nullable=False, index=True),
        sa.Column("at", sa.Double(), nullable=False, index=True),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=True),
        sa.Column("preferred", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("notes", sa.String(), nullable=False),
        sa.UniqueConstraint("review_id", "by"),
    )
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("tier", sa.String(), nullable=False),
        sa.Column("requests_per_minute", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
    )
    op.create_table(
        "admin_act",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("act", sa.String(), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
    )


def downgrade() -> None:
    for table in ("verdict", "review", "event", "api_key", "admin_act"):
        op.drop_table(table)
