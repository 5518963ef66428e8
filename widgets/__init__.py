"""What people look at: figures and tables today, the live panel next. Imports `workbench`; never the other way round."""
