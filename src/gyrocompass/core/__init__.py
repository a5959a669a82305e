"""The ground floor: errors, config, artifacts, the store with its lineage, and progress. Never torch."""
