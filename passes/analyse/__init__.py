"""What can be learned of a network before it is changed: statistics of activations and weights, sensitivity."""
