"""Rewards by name: on text, on code, and by a judge. `registry.py` reads them from YAML."""
