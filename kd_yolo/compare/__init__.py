"""Did distillation help? Matched runs over seeds, paired differences, a verdict."""
