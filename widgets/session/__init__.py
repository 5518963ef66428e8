"""What runs behind the panel: jobs, their worker and their state. It knows no control."""
