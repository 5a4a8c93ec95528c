"""Saving runs and finding them again."""
