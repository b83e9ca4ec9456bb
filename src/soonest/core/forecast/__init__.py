"""What a step would take on other networks, with more ranks or in other ways of training."""
