"""Networks: attention, denoiser, AR-VAE."""
