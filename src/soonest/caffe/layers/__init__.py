"""The layers of nets as modules of torch."""
