"""Judging finished answers: what a reward is (`base`), built-in ones, and where they run (`sandbox`)."""
