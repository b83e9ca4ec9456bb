"""Timelines to look at, as a picture and as text."""
