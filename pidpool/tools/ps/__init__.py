"""``pidpool ps``: which processes hold a database socket together."""
