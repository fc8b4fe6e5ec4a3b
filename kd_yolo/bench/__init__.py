"""Timing, accuracy and size of every artifact in one table."""
