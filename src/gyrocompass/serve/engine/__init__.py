"""The embedded engine: many sequences of one model, decoded together, each as if it were alone."""
