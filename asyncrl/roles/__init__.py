"""What each process does: one module per role, no role imports another, no tensor code."""
