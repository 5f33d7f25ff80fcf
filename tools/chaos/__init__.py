"""`make chaos`: every process killed at every step, and what has to hold afterwards.

    matrix (cases by seed) -> harness (forks a driver per case) -> driver (launch, watch, damage, resume)
                                                                -> checks (audit, replay, litter, recovery)

Nothing here is part of the package: it drives runs from outside, with `asyncrl.chaos` orders inside them.
"""
