"""Files that Caffe reads and writes, and the lines that it prints."""
