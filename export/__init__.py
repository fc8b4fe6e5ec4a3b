"""Export to other runtimes, each artifact proven equal to the unfused float32 model before it exists."""
