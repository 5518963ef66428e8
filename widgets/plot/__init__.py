"""The live trade-off plot and the picture that stands in its place where nothing runs."""
