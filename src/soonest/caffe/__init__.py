"""Caffe: its files, its layers and its command line, trained with soonest."""
