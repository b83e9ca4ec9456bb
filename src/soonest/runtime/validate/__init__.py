"""What is refused, in one sentence each, before anything is changed."""
