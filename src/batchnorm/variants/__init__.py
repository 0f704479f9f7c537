"""The layer's family: what is batch normalization, but not of one batch on axis 1."""
