"""Passes that keep weights in fewer bits."""
