"""What the command ``pidpool`` does, without its command line."""
