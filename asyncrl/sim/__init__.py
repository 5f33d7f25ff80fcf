"""Virtual time: the real ledger, and a whole cluster around it, in one process under a clock that jumps."""
