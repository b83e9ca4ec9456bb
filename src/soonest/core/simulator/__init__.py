"""How long a step under a plan takes, simulated."""
