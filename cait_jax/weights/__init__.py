"""Published weights to the parameter tree and back."""
