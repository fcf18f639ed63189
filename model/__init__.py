"""Networks, losses and the other building blocks of training; `runs` joins them with shards."""
