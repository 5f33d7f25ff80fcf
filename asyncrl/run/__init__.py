"""From a topology to a finished run: the run directory, the session, what is checked before and said after."""
