"""Soonest needed, soonest sent."""
