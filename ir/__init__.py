"""The graph of a network and what can be known of it; imports torch, numpy and scipy alone."""
