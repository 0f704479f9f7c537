"""The layer's family: batch normalization of another batch, with other statistics or on another axis."""
