"""Packaged YAML files: models, methods and data sets. Data only."""
