"""The graph of a network and what can be known of it; imports torch, numpy, scipy and networkx alone."""
