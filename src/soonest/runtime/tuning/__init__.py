"""Which plan to run: what the network costs, which plans are tried, and which one is selected."""
