"""Passes that choose, mask and remove channels."""
