"""Engines turn prompts into tokens. `base` is the interface; `embedded`, `scripted` and `sglang` implement it."""
