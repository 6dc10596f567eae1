"""Models: configuration, weights, positions, and one decoder that runs a packed batch."""
