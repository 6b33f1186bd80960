"""Each number that the documentation gives comes from a measurement here; none is ever an assertion."""
