"""Tasks that a model is asked: read from YAML and JSONL, answered through callables, told with intervals."""
