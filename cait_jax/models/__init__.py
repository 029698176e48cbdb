"""Networks as pure functions of parameters, keys and images."""
