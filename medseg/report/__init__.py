"""Numbers in, page out."""
