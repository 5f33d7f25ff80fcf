"""Engines turn prompts into tokens. `base` is the interface, `make` chooses one."""
