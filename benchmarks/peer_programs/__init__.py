"""What `peers` sets relex-stream beside, each run as a process of its own."""
