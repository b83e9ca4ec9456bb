"""What depends on a device and its host: streams, clocks, threads."""
