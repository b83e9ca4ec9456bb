"""What a step is and how long it takes; pure Python and NumPy."""
