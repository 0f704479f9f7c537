"""The layer's family: batch normalization with other statistics, one kind a file."""
