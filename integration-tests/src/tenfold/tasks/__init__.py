"""Small tasks on real data that comes with installed packages."""
