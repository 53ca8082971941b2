"""`sigma noise`: how noisy a machine is, why, and what that costs on many ranks."""
