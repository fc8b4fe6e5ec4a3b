"""What anomaly models say of images: prediction, validation, and fusion with a detector."""
