"""Caffe's messages, as ``from caffe.proto import caffe_pb2`` gives them."""

from soonest.pycaffe.proto import caffe_pb2

__all__ = ["caffe_pb2"]
