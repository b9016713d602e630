"""Medical volume segmentation: scans in; label maps, volumes, scores and reports out."""

__version__ = "0.1.0"
