"""Passes that make weights one bit wide and activations one to four."""
