"""Questions with a measurement of their own, one file each."""
