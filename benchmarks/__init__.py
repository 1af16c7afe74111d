"""Instruments of this repository, run from a checkout; not part of the installed package. See README.md."""
