"""What is kept: layers, channels, experts and their neurons."""
