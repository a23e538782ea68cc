"""``pidpool top``: reads a stats endpoint."""
