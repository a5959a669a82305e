"""The stages a recipe can name, each a frozen config with a `run` that fills an artifact."""
