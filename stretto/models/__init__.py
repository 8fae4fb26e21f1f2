"""Small readable models, and `roles`: which part of a model is what."""
