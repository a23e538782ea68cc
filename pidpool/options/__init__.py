"""The options of a pool: what they take, as keywords and in a database URL."""
