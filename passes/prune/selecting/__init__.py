"""What `select-channels` is made of: masks per dependency class, their threshold, their schedule, the callback."""
