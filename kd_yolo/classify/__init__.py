"""Classification: distillation of Ultralytics classifiers, LightNet classifiers, chains, and data for them."""
