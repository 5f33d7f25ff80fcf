"""The console commands: `main` registers them, its siblings do the work and are imported when called."""
