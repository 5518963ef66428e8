"""Records drawn as figures and tables, for the panel and for reports alike."""
