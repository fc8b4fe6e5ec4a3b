"""Timing, accuracy and size of every artifact in one table."""

from kd_yolo.bench.harness import benchmark
from kd_yolo.bench.report import BenchReport, BenchRow

__all__ = ["BenchReport", "BenchRow", "benchmark"]
