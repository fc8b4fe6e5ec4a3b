"""Bring defect data into YOLO form, make it, split it and check it."""
