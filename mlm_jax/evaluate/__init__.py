"""How good a model is at what it is for."""
