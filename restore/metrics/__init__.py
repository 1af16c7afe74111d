"""Metrics of single images and of sets, and the networks they need."""
