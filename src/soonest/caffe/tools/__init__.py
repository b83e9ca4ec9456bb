"""The programs that come with Caffe besides its own, each under its name there."""
