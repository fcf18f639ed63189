"""Networks, losses and the other parts of training; `runs` joins them with shards."""
