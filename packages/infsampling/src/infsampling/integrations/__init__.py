"""The sampler inside other libraries."""
