"""Training with and without batch normalization: data, networks, arms, cells, records."""
