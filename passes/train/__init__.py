"""Passes that train: they need data, and most of them a teacher."""
