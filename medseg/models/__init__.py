"""Plan to network; what is shipped."""
