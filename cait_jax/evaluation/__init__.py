"""What a model is worth: exact scores of any checkpoint on any data set."""
