"""The topology file: its tables (`schema`, `training`), how to read it (`load`), what it becomes (`plan`)."""
