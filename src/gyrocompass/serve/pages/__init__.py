"""The pages of a server: what happens, what people decide, which models there are, how training goes."""
