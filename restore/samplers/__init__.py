"""The time loops, one flat function per algorithm."""
