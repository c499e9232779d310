"""Layers of fxpress's own: plain, trainable torch modules."""
