"""A class in the place of torch's ``DistributedDataParallel``, and all that serves only it."""
