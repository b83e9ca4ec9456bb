"""Arms, comparisons and what they show."""
