"""The events of a training loop: forward and backward passes, steps, buffers, uneven inputs."""
