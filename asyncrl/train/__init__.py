"""Training: the interface of a backend, the torch backend, checkpoints, and accuracy of an export."""
