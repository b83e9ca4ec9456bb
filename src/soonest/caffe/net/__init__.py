"""A net: which layers it has, and what they share."""
