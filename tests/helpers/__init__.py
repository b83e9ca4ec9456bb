"""What several rooms' tests use: ranks, models, doubles and oracles."""
