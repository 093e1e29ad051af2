"""Operation families: each folder holds a definition, its kernels and its public functions."""
