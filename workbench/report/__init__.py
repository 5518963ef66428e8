"""The report notebook run headless, its gates, its page, and the table of methods."""
