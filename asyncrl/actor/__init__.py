"""An actor is a mailbox and its loops: `base` runs one, `host` is its process, `supervisor` starts it."""
