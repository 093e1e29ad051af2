"""One module for each third party; each needs its package installed."""
