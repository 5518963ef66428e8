"""Points on disk, as a table, and which of them no other beats."""
