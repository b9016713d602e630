"""Label maps in, numbers out."""
