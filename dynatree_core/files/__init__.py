"""Files: how they are written and checked, and where ours are kept."""
