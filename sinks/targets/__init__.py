"""One file per target system."""
