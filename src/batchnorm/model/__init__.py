"""What is done to a whole model because it has batch normalization in it."""
