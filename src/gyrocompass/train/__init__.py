"""One training loop: batches x objective, with checkpoints that resume bit-identically and a guard."""
