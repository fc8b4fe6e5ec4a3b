"""What can teach: one file a kind of teacher, all behind ``base.Teacher``."""
