"""Alembic's migrations of the store's schema; `database.py` runs them when a store is opened."""
