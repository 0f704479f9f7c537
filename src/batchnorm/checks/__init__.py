"""Find what is wrong with the batch normalization in a model or a training."""
