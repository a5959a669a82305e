"""Artifacts, edges, stages and documents."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "artifact",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("content_hash", sa.String(), nullable=False),
        sa.Column("code_version", sa.String(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("lists_documents", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "edge",
        sa.Column("child_id", sa.String(), sa.ForeignKey("artifact.id"), primary_key=True),
        sa.Column("role", sa.String(), primary_key=True),
        sa.Column("parent_id", sa.String(), nullable=False, index=True),
    )
    op.create_table(
        "stage",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("artifact_id", sa.String(), sa.ForeignKey("artifact.id"), nullable=False, index=True),
    )
    op.create_table(
        "document",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("path", sa.String(), nullable=False, index=True),
        sa.Column("source", sa.String(), nullable=False),
    )
    op.create_table(
        "origin",
        sa.Column("document_id", sa.String(), sa.ForeignKey("document.id"), primary_key=True),
        sa.Column("origin_id", sa.String(), primary_key=True, index=True),
    )
    op.create_table(
        "listing",
        sa.Column("artifact_id", sa.String(), sa.ForeignKey("artifact.id"), primary_key=True),
        sa.Column("document_id", sa.String(), sa.ForeignKey("document.id"), primary_key=True, index=True),
        sa.Column("slice", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
    )


def downgrade() -> None:
    for table in ("listing", "origin", "document", "stage", "edge", "artifact"):
        op.drop_table(table)
