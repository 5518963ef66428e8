"""The panes of the panel beside the plot."""
