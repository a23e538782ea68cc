"""Every event of a pool: how it is counted, logged, and kept until it may be logged."""
