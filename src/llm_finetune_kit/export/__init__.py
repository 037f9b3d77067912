"""A result in the shape that other programs load."""
