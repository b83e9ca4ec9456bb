"""The user's optimizer: its ``step`` patched, run by bucket, its state whole or sharded."""
