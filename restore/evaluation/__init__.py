"""Measuring restorations: data sets, metrics, protocols, benchmark runs, reports."""
