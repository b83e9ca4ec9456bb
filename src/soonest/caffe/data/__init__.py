"""Where records come from, and what is done to images on the way."""
