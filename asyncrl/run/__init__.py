"""From a topology to a finished run: directory, session, what is checked before and said after."""
