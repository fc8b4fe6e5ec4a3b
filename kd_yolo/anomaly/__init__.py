"""Anomaly detection: learn from normal images only, mark what differs (task=anomaly)."""
