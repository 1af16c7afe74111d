"""Reports of benchmark runs for people."""
