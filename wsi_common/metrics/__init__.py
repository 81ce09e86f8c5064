"""Metrics that more than one stage needs, as pure functions of arrays."""
