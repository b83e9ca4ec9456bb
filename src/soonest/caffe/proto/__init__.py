"""Caffe's messages, and the two formats in which files hold them."""
