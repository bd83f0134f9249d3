"""The mathematics of AR-Diffusion: torch only, no files, no process group."""
