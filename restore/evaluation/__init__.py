"""Data sets, metrics, protocols, benchmark runs and reports."""
