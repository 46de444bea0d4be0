"""Models, one file each, as plain torch modules."""
