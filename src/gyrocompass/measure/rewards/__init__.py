"""Rewards by name: on text, on code, and by a judge. `entries.py` reads them from YAML."""
