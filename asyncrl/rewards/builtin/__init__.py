"""Rewards that come with the package; each has a user function's signature and runs where those do."""
