"""The desk: `ledger` decides, `store` and `segments` write, `select` holds the rule, `audit` proves it."""
