"""What is predicted from what: pure functions of tokens and a random state."""
