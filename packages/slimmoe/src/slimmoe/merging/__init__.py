"""What becomes of experts that are not kept: similarity, groups, averages."""
