"""Other libraries on the ops, one module for each host; a host is imported on use."""
