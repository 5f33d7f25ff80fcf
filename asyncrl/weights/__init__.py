"""Versions of the weights: their contents (`manifest`), their maker (`publisher`), their way (`carriers`)."""
