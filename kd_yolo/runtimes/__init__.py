"""Run exported files: one session class a runtime, one description of what a file says about itself."""

from kd_yolo.runtimes.base import Description, Session, check_same_classes
from kd_yolo.runtimes.opening import artifact_format, describe, open_session

__all__ = ["Description", "Session", "artifact_format", "check_same_classes", "describe", "open_session"]
