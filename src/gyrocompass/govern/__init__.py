"""Which artifact is which: names and versions, promotions that are proofs, and the way back."""
