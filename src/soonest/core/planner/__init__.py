"""Finds a plan: which pieces are sent, how, and in which order."""
