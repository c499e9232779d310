"""The graph, and what can be known of it: tracing, channel labels, groups, costs, the oracle."""
