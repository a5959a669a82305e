"""The demo's second half: the model that was made is registered, served, doubted, taught and replaced."""
