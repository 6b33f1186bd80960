"""`make demo`: a governed sample agent in a throw-away container, and what became of each of its attempts."""
