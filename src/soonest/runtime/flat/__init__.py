"""Flat buffers of gradients, and the parameters they belong to."""
