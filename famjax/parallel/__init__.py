"""A mesh of devices, and where arrays lie on it. May import: model."""
