"""Trains, scores and times nets as Caffe's solvers do."""
