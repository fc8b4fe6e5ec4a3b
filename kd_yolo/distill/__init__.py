"""Teacher and student: taps, methods, schedule and the wrapped model."""
