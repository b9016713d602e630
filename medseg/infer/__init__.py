"""One scan in, one label map out."""
