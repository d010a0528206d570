"""Training: the two stages of the method, and the synthetic world that proves them."""
