"""What happened when in a step, and which rank was late."""
