"""Training: from a corpus and a recipe to the weights of a model."""
