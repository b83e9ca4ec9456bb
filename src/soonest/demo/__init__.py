"""A small GPT, trained with and without soonest, to see what that changes."""
