"""One file per distillation method; found by file name, not by registration."""
