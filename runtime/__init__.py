"""What runs, what trains, what is stored and what measures."""
