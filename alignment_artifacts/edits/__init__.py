"""What an intervention does to activations: modes, settings applied to a model, proof that they did something."""
