"""Observability: logs, metrics, and the views of a run that people read. Nothing here may stop a run."""
