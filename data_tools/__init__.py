"""Builds, checks and describes datasets of WebDataset shards from videos: ``python -m data_tools --help``."""
