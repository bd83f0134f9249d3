"""ardist trains AR-Diffusion video models and samples videos of any length (arXiv 2503.07418)."""

__version__ = "0.1.0"
