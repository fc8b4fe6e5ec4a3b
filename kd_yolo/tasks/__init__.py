"""Trainers, one per task."""
