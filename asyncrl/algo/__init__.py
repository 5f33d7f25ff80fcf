"""The mathematics of training: pure functions on tensors, no configuration, no state, no clock."""
