"""Datasets of WebDataset shards: manifest, index, exact order, verified reading, batches."""
