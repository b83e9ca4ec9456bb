"""Executes a plan on the flat buffers: a plan bound to them, the state of a pass, the lanes."""
