"""What an intervention does to activations: the modes, a setting put into a model, and proof that it did something."""
