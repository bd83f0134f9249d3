"""Metrics and their pinned protocols."""
